"""The sections of the configuration: strict, frozen pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class StudentConfig(Section):
    path: str
    freeze: list[Literal["embedding", "lm_head"]] = []


class TeacherParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)


class TeacherConfig(Section):
    path: str
    parallel: TeacherParallelConfig | None = None  # None: the student's layout
    offload_targets: bool = False


class DataConfig(Section):
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


class RolloutConfig(Section):
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


class RepresentationConfig(Section):
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


class OutputConfig(Section):
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


class LossConfig(Section):
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


class ParallelConfig(Section):
    tensor: int = Field(1, ge=1)
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int | None = Field(None, ge=2)
    context: int = Field(1, ge=1)
    expert: int = Field(1, ge=1)
    sequence: bool = False
    distributed_optimizer: bool = True
    world_size: int | None = Field(None, ge=1)  # the processes that a recipe is made for; None: any
    cp_comm_type: Literal["auto", "all_gather", "p2p", "a2a"] = "auto"
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    tp_comm_overlap: bool = False

    @model_validator(mode="after")
    def _overlap_of_what_is_there(self) -> ParallelConfig:
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
                "parallel.overlap_grad_reduce=true"
            )
        if self.tp_comm_overlap and not self.sequence:
            raise ValueError("parallel.tp_comm_overlap=true needs parallel.sequence=true")
        return self


class BatchConfig(Section):
    max_tokens_per_micro_batch: int = Field(32768, ge=1)
    packing: bool = True


class KeepBf16Config(Section):
    """How many of the lowest and of the highest blocks compute in bf16 beside FP8."""

    first: int = Field(1, ge=0)
    last: int = Field(1, ge=0)


class PrecisionConfig(Section):
    dtype: Literal["bf16", "fp32"] = "bf16"
    attention: Literal["auto", "te", "sdpa"] = "auto"
    fp8: Literal["hybrid", "e4m3"] | None = None  # of the student
    recipe: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] = "tensorwise"
    teacher_fp8: Literal["off", "compute", "weights"] = "off"
    keep_bf16: KeepBf16Config = KeepBf16Config()
    pad_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"  # a rank's tokens, to a multiple of it

    @field_validator("teacher_fp8", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML reads a bare `off` as false."""
        return "off" if value is False else value


class RecomputeConfig(Section):
    granularity: Literal["none", "selective", "full"] = "none"
    method: Literal["uniform", "block"] = "uniform"
    num_layers: int = Field(1, ge=1)


class OptimizerConfig(Section):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1.0e-5, gt=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.01, ge=0.0)
    clip_grad: float = Field(1.0, ge=0.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_fraction: float = Field(0.03, ge=0.0, le=1.0)
    precision_aware: bool = False
    cpu_offload: float = Field(0.0, ge=0.0, le=1.0)  # the share of its state that lives in CPU memory


class TrainConfig(Section):
    steps: int = Field(500, ge=0)
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: str


class CheckpointConfig(Section):
    every: int = Field(50, ge=0)
    keep: int = Field(2, ge=1)
    resume: Literal["auto", "never"] = "auto"
    export_hf: bool = True
    asynchronous: bool = False


class EvaluationConfig(Section):
    every: int = Field(0, ge=0)
    data: list[str] = []
    samples: int = Field(16, ge=1)
    temperature: float = Field(0.7, ge=0.0)
    top_p: float = Field(0.95, gt=0.0, le=1.0)
    max_new_tokens: int = Field(31744, ge=1)


class HealthConfig(Section):
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


class BridgeConfig(Section):
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


class WatchdogConfig(Section):
    """What looks after the processes of a run."""

    heartbeat_seconds: float = Field(10.0, ge=0.0)  # 0: no heartbeat
    timeout_seconds: float = Field(1800.0, gt=0.0)  # without progress of a rank, and of a collective
    straggler_every: int = Field(0, ge=0)
    straggler_ratio: float = Field(1.5, gt=1.0)
