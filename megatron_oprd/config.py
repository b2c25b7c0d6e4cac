"""The configuration: strict, frozen pydantic models, read from YAML and dotted overrides (`a.b=1`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megatron_oprd.types import UserError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StudentConfig(_Section):
    path: str
    freeze: list[Literal["embedding", "lm_head"]] = []


class TeacherParallelConfig(_Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)


class TeacherConfig(_Section):
    path: str
    parallel: TeacherParallelConfig | None = None  # None: the student's layout
    offload_targets: bool = False


class DataConfig(_Section):
    prompts: list[str] = []
    prompt_key: str = "prompt"
    teacher_prompt_key: str | None = None
    max_prompt_tokens: int = Field(2048, ge=1)
    shuffle: bool = True
    append_instruction: Literal["auto"] | bool = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    teacher_chat_template_kwargs: dict[str, Any] | None = None  # None: as chat_template_kwargs

    @property
    def own_teacher_prompts(self) -> bool:
        """Whether teachers read other prompts than the student, in the same tokens or not."""
        return self.teacher_prompt_key is not None or self.teacher_chat_template_kwargs is not None

    @property
    def teacher_kwargs(self) -> dict[str, Any]:
        """What the chat template of a teacher's prompt is given."""
        own = self.teacher_chat_template_kwargs
        return self.chat_template_kwargs if own is None else own


class RolloutConfig(_Section):
    engine: Literal["megatron", "replay"] = "megatron"
    path: str | None = None
    prompts_per_step: int = Field(8, ge=1)
    samples_per_prompt: int = Field(2, ge=1)
    temperature: float = Field(1.0, ge=0.0)
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    top_k: int = Field(0, ge=0)
    max_new_tokens: int = Field(16384, ge=1)

    @model_validator(mode="after")
    def _replay_needs_a_path(self) -> RolloutConfig:
        if self.engine == "replay" and not self.path:
            raise ValueError("rollout.path: engine replay needs the JSONL file to read")
        return self


class RepresentationConfig(_Section):
    weight: float = Field(1.0, ge=0.0)
    layers: Literal["all", "last", "even", "odd"] | list[int] = "all"
    pairs: list[tuple[int, int]] | None = None
    positions: Literal["all", "last", "last_k", "first_k"] = "last_k"
    k: int = Field(2000, ge=1)
    normalize: Literal["none", "l2"] = "none"
    aggregation: Literal["sequence_mean", "token_mean"] = "sequence_mean"
    final_norm: bool = True
    shift: Literal[0, -1] = 0
    bridge: str | None = None  # what `megatron_oprd.bridge.fit` wrote (OPRD-Bridge); None: OPRD-Vanilla
    train_bridge: bool = False  # whether the student's side of the bridge moves

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_a_bridge(cls, values: Any) -> Any:
        """OPRD-Bridge has defaults of its own; the resolved configuration shows them."""
        if isinstance(values, dict) and values.get("bridge") is not None:
            return {"weight": 10.0, "normalize": "l2", **values}
        return values

    @model_validator(mode="after")
    def _a_bridge_to_train(self) -> RepresentationConfig:
        if self.train_bridge and self.bridge is None:
            raise ValueError("loss.representation.train_bridge=true needs loss.representation.bridge")
        return self


class OutputConfig(_Section):
    objective: Literal["none", "sampled", "topk_surrogate", "topk_kl", "full_kl"] = "none"
    weight: float = Field(1.0, gt=0.0)
    k: int = Field(16, ge=1)
    support: Literal["student", "teacher", "union"] = "student"
    tail_bucket: bool = False
    direction: Literal["reverse", "forward", "jsd"] = "reverse"
    beta: float = Field(0.5, ge=0.0, le=1.0)
    teacher_temperature: float = Field(1.0, gt=0.0)
    positions: Literal["all", "last", "last_k", "first_k"] = "all"
    positions_k: int = Field(2000, ge=1)
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    chunk_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] | None = "auto"
    metrics_every: int = Field(10, ge=0)


class LossConfig(_Section):
    representation: RepresentationConfig = RepresentationConfig()
    output: OutputConfig = OutputConfig()

    @property
    def reads_layers(self) -> bool:
        """Whether hidden states are compared."""
        return self.representation.weight > 0

    @property
    def reads_output(self) -> bool:
        """Whether next-token distributions are compared."""
        return self.output.objective != "none"

    @model_validator(mode="after")
    def _something_to_learn(self) -> LossConfig:
        if not (self.reads_layers or self.reads_output):
            raise ValueError(
                "loss.representation.weight=0 and loss.output.objective=none leave nothing to learn; set one of them"
            )
        return self


class ParallelConfig(_Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int | None = Field(None, ge=2)
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    sequence: bool = False
    distributed_optimizer: bool = True


class BatchConfig(_Section):
    max_tokens_per_micro_batch: int = Field(32768, ge=1)
    packing: bool = True


class PrecisionConfig(_Section):
    dtype: Literal["bf16", "fp32"] = "bf16"
    fp8: None = None


class RecomputeConfig(_Section):
    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = Field(1, ge=1)


class OptimizerConfig(_Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1.0e-5, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0.0)
    clip_grad: float = Field(1.0, ge=0.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(0.03, ge=0.0, le=1.0)


class TrainConfig(_Section):
    steps: int = Field(500, ge=0)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: str


class CheckpointConfig(_Section):
    every: int = Field(50, ge=0)
    keep: int = Field(2, ge=1)
    resume: Literal["auto", "never"] = "auto"
    export_hf: bool = True


class EvaluationConfig(_Section):
    every: int = Field(0, ge=0)
    data: list[str] = []
    samples: int = Field(16, ge=1)
    temperature: float = Field(0.7, ge=0.0)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    max_new_tokens: int = Field(31744, ge=1)


class HealthConfig(_Section):
    """What watches for a collapse: `every` so many steps (0: never)."""

    every: int = Field(0, ge=0)
    prompts: int = Field(64, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    perplexity_ratio: float = Field(1.25, gt=1.0)
    stop: bool = False  # whether a warning ends the training

    @model_validator(mode="after")
    def _stop_needs_a_watch(self) -> HealthConfig:
        if self.stop and not self.every:
            raise ValueError("health.stop=true needs health.every above 0")
        return self


class BridgeConfig(_Section):
    """What `megatron_oprd.bridge.fit` does; a training run does not read it."""

    prompts: int = Field(2000, ge=2)
    ranks: list[Annotated[int, Field(ge=1)]] = Field([8], min_length=1)
    held_out_fraction: float = Field(0.1, gt=0.0, lt=1.0)
    method: Literal["closed_form", "adamw"] = "closed_form"
    ridges: list[Annotated[float, Field(ge=0.0)]] = Field(
        [0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0], min_length=1
    )
    epochs: int = Field(20, ge=1)  # of adamw
    lr: float = Field(1.0e-4, gt=0.0)  # of adamw
    save_every: int = Field(10, ge=1)


class Config(_Section):
    student: StudentConfig
    teacher: TeacherConfig | None = None
    teachers: dict[str, TeacherConfig] = {}  # by the data_source of the prompts that each one teaches
    teachers_in_memory: Literal["all", "one"] = "all"
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    batch: BatchConfig = BatchConfig()
    precision: PrecisionConfig = PrecisionConfig()
    recompute: RecomputeConfig = RecomputeConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    bridge: BridgeConfig = BridgeConfig()

    @model_validator(mode="before")
    @classmethod
    def _health_of_a_bridge(cls, values: Any) -> Any:
        """A student led by a bridge alone may collapse: it is watched unless the user says otherwise."""
        match values:
            case {"loss": {"representation": {"bridge": str()}}}:
                health = values.get("health", {})
                return {**values, "health": {"every": 10, **health} if isinstance(health, dict) else health}
        return values

    @model_validator(mode="after")
    def _prompts_or_replay(self) -> Config:
        if self.rollout.engine == "megatron" and not self.data.prompts:
            raise ValueError("data.prompts: name at least one prompt file (only rollout.engine=replay needs none)")
        return self

    @model_validator(mode="after")
    def _one_teacher_or_several(self) -> Config:
        if self.teacher is None and not self.teachers:
            raise ValueError("teacher is required: teacher.path, or teachers with one for each data_source")
        if self.teacher is not None and self.teachers:
            raise ValueError("teacher and teachers are both given: name one teacher for all prompts, or several")
        if "" in self.teachers:
            raise ValueError("teachers: the name '' is empty; name each teacher by the data_source of its prompts")
        return self

    @model_validator(mode="after")
    def _stored_prompts_of_the_teacher(self) -> Config:
        if self.rollout.engine == "replay" and self.data.teacher_prompt_key is not None:
            raise ValueError(
                f"data.teacher_prompt_key={self.data.teacher_prompt_key} is not read with rollout.engine=replay; put "
                "teacher_prompt_ids into the lines of rollout.path"
            )
        return self

    @model_validator(mode="after")
    def _a_temperature_for_probabilities(self) -> Config:
        if self.loss.reads_output and self.rollout.temperature == 0:
            raise ValueError(
                f"rollout.temperature=0 has no probabilities for loss.output.objective={self.loss.output.objective}; "
                "use one above 0"
            )
        return self

    @property
    def named_teachers(self) -> dict[str, TeacherConfig]:
        """The teachers by data_source; a single one, which teaches all prompts, under the empty name."""
        return self.teachers if self.teacher is None else {"": self.teacher}


def teacher_section(name: str) -> str:
    """The section of the configuration where one of `named_teachers` stands."""
    return f"teachers.{name}" if name else "teacher"


def teacher_title(name: str) -> str:
    """What messages call one of `named_teachers`."""
    return f"teacher {name}" if name else "teacher"


# How messages tell the way to a bridge.
MAKE_A_BRIDGE = "make a bridge with torchrun -m megatron_oprd.bridge.fit --config F"


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """The configuration from a YAML file (or none) and overrides like `parallel.tensor=2`, the last one winning.

    Raises UserError, one line naming the key, its value and what would work. No communication.
    """
    try:
        tree: Any = OmegaConf.create(_read_yaml(Path(path)) if path is not None else {})
    except (OmegaConfBaseException, RecursionError) as error:  # a date, which YAML makes of 2024-01-31; a loop
        key = getattr(error, "full_key", None)
        raise UserError(f"the configuration {path}{f', {key}' if key else ''}: {_first_line(error)}") from None
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not of the form key=value")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
            raise UserError(f"override {override!r}: {_first_line(error)}") from None
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    return parse_config(values)


def parse_config(values: Any) -> Config:
    """The validated configuration of a plain mapping; raises UserError with every offending key on one line."""
    try:
        return Config.model_validate(_tuples(values))
    except ValidationError as error:
        raise UserError("; ".join(_explain(item) for item in _without_alternatives(error.errors()))) from None


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the configuration {path} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"the configuration {path} must be a mapping of sections, not a {type(values).__name__}")
    return values


def _tuples(values: Any) -> Any:
    """YAML has no tuples and strict pydantic takes no list for one: convert the two places that want them."""
    if not isinstance(values, dict):
        return values
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("betas"), list):
        optimizer["betas"] = tuple(optimizer["betas"])
    loss = values.get("loss")
    if isinstance(loss, dict) and isinstance(loss.get("representation"), dict):
        representation = dict(loss["representation"])
        if isinstance(representation.get("pairs"), list):
            representation["pairs"] = [tuple(p) if isinstance(p, list) else p for p in representation["pairs"]]
        values["loss"] = {**loss, "representation": representation}
    return values


def _annotation(location: tuple[Any, ...]) -> Any:
    """The type of what stands at a location of the configuration; None where nothing does."""
    found: Any = Config
    for part in location:
        model, mapping = _model(found), get_origin(found) is dict
        field = model.model_fields.get(part) if model else None
        found = get_args(found)[1] if mapping else field.annotation if field else None
    return found


def _model(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *get_args(annotation)] if get_origin(annotation) is not dict else []
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model = _model(_annotation(location))
    return list(model.model_fields) if model is not None else []


def _without_alternatives(errors: Iterable[Any]) -> list[Mapping[str, Any]]:
    """One error a value. Of a value that may be of several types, pydantic tells one for each: those that found it
    wrong inside speak alone, the others together."""
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for error in errors:
        location = tuple(error["loc"])
        place = next((location[:end] for end in range(len(location)) if _has_alternatives(location[:end])), location)
        grouped.setdefault(place, []).append({**error, "loc": place + location[len(place) + 1 :]})
    merged = []
    for place, items in grouped.items():
        inside = [item for item in items if len(item["loc"]) > len(place)]
        first, *others = items
        more = (item["msg"].removeprefix("Input should be ") for item in others)
        merged += inside or [{**first, "msg": " or ".join([first["msg"], *more])}]
    return merged


def _has_alternatives(location: tuple[Any, ...]) -> bool:
    annotation = _annotation(location)
    types = [kind for kind in get_args(annotation) if kind is not NoneType]
    return get_origin(annotation) in (Union, UnionType) and len(types) > 1


def _explain(item: Any) -> str:
    location = tuple(item["loc"])
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
        return f"unknown key {key}" + (
            f" (did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?)" if near else ""
        )
    if location[-1:] == ("[key]",):
        return f"{'.'.join(map(str, location[:-2]))}: the name {item['input']!r} is no text; put it in quotes"
    if item["type"] == "missing":
        return f"{key} is required"
    if item["type"] == "model_type":
        return f"{key}={item['input']!r} must be a section with {', '.join(_known_keys(location))}"
    if item["type"] == "none_required":
        return f"{key}={item['input']!r} is not supported yet; leave it null"
    message = item["msg"].removeprefix("Value error, ")
    return message if not key or message.startswith(key) else f"{key}={item['input']!r}: {message}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
