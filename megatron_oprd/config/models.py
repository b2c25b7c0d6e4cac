"""Sections about the models: paths, layouts, precision and recomputation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from megatron_oprd.config.section import LAYERS, RANKS, TOKENS, PathText, Section


class ModelFolder(Section):
    """The folder with the weights of a model, and where config.json and tokenizer are."""

    path: PathText
    hf: PathText | None = Field(
        None,
        description="Hugging Face folder with config.json and tokenizer, for a checkpoint of Megatron-LM or "
        "Megatron-Bridge at `path`; null: they are in `path`",
    )

    @property
    def model_files(self) -> str:
        """Return the folder with config.json and tokenizer."""
        return self.hf or self.path


class StudentConfig(ModelFolder):
    """The model that is trained."""

    path: PathText = Field(description="Hugging Face folder or Megatron checkpoint of the student's first weights")
    freeze: list[Literal["embedding", "lm_head"]] = Field([], description="parts that are not trained")


class TeacherParallelConfig(Section):
    """The layout of a teacher whose layout differs from the student's."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size", json_schema_extra=RANKS)
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size", json_schema_extra=RANKS)
    expert: int = Field(1, ge=1, description="expert-parallel size", json_schema_extra=RANKS)


class TeacherBaseConfig(ModelFolder):
    """The model that the teacher was trained from; the student learns beyond the teacher, along their difference."""

    path: PathText = Field(description="Hugging Face folder or Megatron checkpoint of the teacher's start")
    extrapolate: float = Field(
        1.25,
        gt=0.0,
        description="lambda: targets are base + lambda (teacher - base). 1 is the teacher, and the base is not opened",
    )
    space: Literal["representation", "output", "both"] = Field(
        "representation",
        description="what is extrapolated: the hidden states, the logits before the teacher's temperature, or both",
    )


class TeacherConfig(ModelFolder):
    """The model that the student learns from: a frozen one, or a moving average of the student itself."""

    path: PathText = Field(description="Hugging Face folder or Megatron checkpoint of the teacher")
    parallel: TeacherParallelConfig | None = Field(
        None, description="layout of the teacher on the same processes; null: the student's layout"
    )
    offload_targets: bool = Field(False, description="keep the teacher's hidden states in CPU memory")
    base: TeacherBaseConfig | None = Field(
        None, description="extrapolate the targets beyond the teacher; null: learn from the teacher's own"
    )
    ema: float | None = Field(
        None,
        ge=0.0,
        le=1.0,
        description="after each update the teacher's weights become ema * own + (1 - ema) * student's; 0: those of the "
        "student, 1 or null: frozen. `path` has the first weights, in the student's architecture",
    )

    @property
    def follows_student(self) -> bool:
        """Return True if the teacher's weights change after each update."""
        return self.ema is not None and self.ema < 1.0

    @property
    def extrapolates(self) -> bool:
        """Return True if a base is needed."""
        return self.base is not None and self.base.extrapolate != 1.0

    @property
    def extrapolates_layers(self) -> bool:
        """Return True if the hidden states are extrapolated."""
        return self.base is not None and self.extrapolates and self.base.space != "output"

    @property
    def extrapolates_output(self) -> bool:
        """Return True if the logits are extrapolated."""
        return self.base is not None and self.extrapolates and self.base.space != "representation"


class ParallelConfig(Section):
    """The layout of the student. The processes that remain are data parallel."""

    tensor: int = Field(1, ge=1, description="tensor-parallel size", json_schema_extra=RANKS)
    pipeline: int = Field(1, ge=1, description="pipeline-parallel size", json_schema_extra=RANKS)
    virtual_pipeline: int | None = Field(
        None, ge=2, description="model chunks on each pipeline rank (interleaved schedule); null: one"
    )
    context: int = Field(1, ge=1, description="context-parallel size", json_schema_extra=RANKS)
    expert: int = Field(
        1, ge=1, description="ranks that share the experts of a layer; no expert is split", json_schema_extra=RANKS
    )
    sequence: bool = Field(False, description="divide activations over the tensor-parallel ranks")
    distributed_optimizer: bool = Field(True, description="divide optimizer state over the data-parallel ranks")
    world_size: int | None = Field(
        None, ge=1, description="processes that a recipe is made for; null: any number", json_schema_extra=RANKS
    )
    cp_comm_type: Literal["auto", "all_gather", "p2p", "a2a"] = Field(
        "auto", description="communication of attention under context parallelism"
    )
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while backward runs")
    overlap_param_gather: bool = Field(
        False,
        description="gather updated weights while the next step begins; needs distributed_optimizer and "
        "overlap_grad_reduce",
    )
    tp_comm_overlap: bool = Field(
        False,
        description="overlap tensor-parallel communication with computation; needs sequence, Transformer Engine and "
        "a GPU",
    )

    @model_validator(mode="after")
    def _overlap_has_what_it_needs(self) -> ParallelConfig:
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError(
                "parallel.overlap_param_gather=true needs parallel.distributed_optimizer=true and "
                "parallel.overlap_grad_reduce=true; set both or leave it out"
            )
        if self.tp_comm_overlap and not self.sequence:
            raise ValueError("parallel.tp_comm_overlap=true needs parallel.sequence=true; set it or leave it out")
        return self


class KeepBf16Config(Section):
    """The blocks that compute in bf16 when the others compute in FP8."""

    first: int = Field(1, ge=0, description="number of lowest blocks in bf16", json_schema_extra=LAYERS)
    last: int = Field(1, ge=0, description="number of highest blocks in bf16", json_schema_extra=LAYERS)


# Other names of the dtypes that PrecisionConfig accepts.
_DTYPE_NAMES = {
    "bfloat16": "bf16",
    "float32": "fp32",
    "float": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float32": "fp32",
}


class PrecisionConfig(Section):
    """Number formats and attention kernels; docs/precision_table.md lists the combinations."""

    dtype: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="dtype of weights and activations; auto: bf16 with CUDA or FP8, fp32 on a CPU"
    )
    attention: Literal["auto", "te", "sdpa"] = Field(
        "auto", description="core attention: Transformer Engine (te), PyTorch (sdpa), or te if the machine has it"
    )
    fp8: Literal["hybrid", "e4m3"] | None = Field(None, description="FP8 format of the student; null: no FP8")
    recipe: Literal["tensorwise", "blockwise", "delayed", "mxfp8"] = Field("tensorwise", description="FP8 scaling")
    teacher_fp8: Literal["auto", "off", "compute", "weights"] = Field(
        "auto",
        description="FP8 of the teacher: none, in its matrix products, or in its stored weights only; auto: weights "
        "from step 2 on if teacher_fp8_share allows it, with compute capability 9.0 and Transformer Engine, else off",
    )
    teacher_fp8_share: float = Field(
        0.01,
        gt=0.0,
        le=1.0,
        description="auto chooses FP8 if the error of the teacher's states is at most this share of the first rep/mse",
    )
    keep_bf16: KeepBf16Config = KeepBf16Config()
    pad_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="pad the tokens of a micro-batch on each rank to a multiple of this number; auto: what the FP8 "
        "recipe needs",
        json_schema_extra=TOKENS,
    )

    @field_validator("dtype", mode="before")
    @classmethod
    def _accept_names_of_torch(cls, value: Any) -> Any:
        return _DTYPE_NAMES.get(value, value) if isinstance(value, str) else value

    @property
    def first_teacher_fp8(self) -> Literal["off", "compute", "weights"]:
        """Return `teacher_fp8` of the first step, in which `auto` is off."""
        return "off" if self.teacher_fp8 == "auto" else self.teacher_fp8

    @field_validator("teacher_fp8", mode="before")
    @classmethod
    def _accept_bare_off(cls, value: Any) -> Any:
        """Accept a bare `off`, which YAML parses as false."""
        return "off" if value is False else value


Part = Literal["layernorm", "activation", "core_attn", "mlp"]


class StageRecomputeConfig(Section):
    """Recomputation of one pipeline rank."""

    parts: list[Part] = Field([], description="parts that are recomputed in the other blocks")
    blocks: int = Field(
        0, ge=0, description="first blocks of each chunk that are recomputed completely", json_schema_extra=LAYERS
    )


class RecomputeConfig(Section):
    """Recomputation of activations (activation checkpointing) in the student's backward pass."""

    granularity: Literal["auto", "none", "selective", "full"] = Field(
        "none",
        description="what is recomputed: nothing, parts of each block, or blocks; auto: the least with which an update "
        "fits into memory. `recompute: auto` is short for it",
    )
    method: Literal["uniform", "block"] = Field(
        "uniform", description="full recomputation of all layers in groups, or of the first layers of each stage"
    )
    num_layers: int = Field(
        1, ge=1, description="layers of a group (uniform) or of a stage (block)", json_schema_extra=LAYERS
    )
    parts: list[Part] | None = Field(
        None,
        description="parts of a block that are recomputed with granularity=selective, or with method=block in the "
        "other blocks; null: core_attn with granularity=selective, otherwise none",
    )
    stages: list[StageRecomputeConfig] | None = Field(
        None, description="recomputation of each pipeline rank, lowest first, in place of the keys above"
    )

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_auto(cls, value: Any) -> Any:
        return {"granularity": "auto"} if value == "auto" else value

    @model_validator(mode="after")
    def _parts_belong_to_blocks_that_are_not_recomputed(self) -> RecomputeConfig:
        if self.stages is not None and (self.granularity != "none" or self.parts):
            raise ValueError("recompute.stages says all that is recomputed; leave out granularity and parts")
        if self.parts and (
            self.granularity in ("auto", "none") or (self.granularity, self.method) == ("full", "uniform")
        ):
            raise ValueError(
                f"recompute.parts has no effect with recompute.granularity={self.granularity}; use "
                "granularity=selective, or granularity=full with method=block"
            )
        return self
