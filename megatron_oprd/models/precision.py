"""Translate the section `precision` to arguments of Megatron-Core.

Megatron-Core silently ignores settings that it cannot follow. They are refused here. No communication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_oprd.config import ParallelConfig, PrecisionConfig
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.tp_overlap import tp_overlap_arguments
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.types import UserError

# The dimensions of an FP8 product, and the tokens of a rank, must be multiples of this number.
MULTIPLE = {"tensorwise": 16, "delayed": 16, "blockwise": 128, "mxfp8": 32}
_OLDEST_TE = (2, 10)  # older versions lack calls of Megatron-Core: tests/unit/test_te_contract.py


@dataclass(frozen=True)
class ModelPrecision:
    """The module set of one model, and its precision arguments for Megatron-Core."""

    transformer_engine: bool = False  # modules of Transformer Engine instead of our own
    scaled_weights: bool = False  # FP8 weights without Transformer Engine (`models/scaled_linear.py`)
    keep_bf16: tuple[int, int] = (0, 0)  # the number of lowest and of highest layers without FP8
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of TransformerConfig

    @property
    def in_fp8(self) -> bool:
        """Return True if some layers compute in FP8 or store their weights in FP8."""
        return self.scaled_weights or "fp8" in self.arguments


PLAIN = ModelPrecision()  # our own modules, in the dtype of the weights


@dataclass(frozen=True)
class Precision:
    """The precision of a run."""

    student: ModelPrecision = PLAIN
    teacher: ModelPrecision = PLAIN  # of all teachers
    pad_tokens: int = 1  # the tokens of a rank in a micro-batch are padded to a multiple of this number
    fp8_candidate: ModelPrecision | None = None  # that `teacher_fp8: auto` may choose for all teachers after step 1

    @property
    def exact_teacher(self) -> ModelPrecision:
        """Return the teacher's precision with the same modules and without FP8."""
        exchange = {name: value for name, value in self.teacher.arguments.items() if name == "cp_comm_type"}
        return ModelPrecision(self.teacher.transformer_engine, arguments=exchange)

    @property
    def attention(self) -> str:
        """Return the name of the core attention."""
        return "Transformer Engine" if self.student.transformer_engine else "torch scaled_dot_product_attention"


def plan_precision(config: PrecisionConfig, parallel: ParallelConfig, machine: Machine) -> Precision:
    """Return the precision of student and teachers on a machine. No communication.

    Args:
        config: The section `precision`.
        parallel: The student's layout.
        machine: Transformer Engine, CUDA and the device of this process.

    Raises:
        UserError: The machine or Megatron-Core does not support a setting (table in docs/precision_table.md).
    """
    if config.teacher_fp8 == "auto":
        return _plan_automatic(config, parallel, machine)
    te = _takes_transformer_engine(config, machine)
    if not te and parallel.cp_comm_type in ("p2p", "a2a"):
        raise UserError(
            f"parallel.cp_comm_type={parallel.cp_comm_type} needs Transformer Engine's attention (precision.attention="
            "te); without it keys and values are gathered: use parallel.cp_comm_type=auto"
        )
    teacher_in_fp8 = config.teacher_fp8 != "off"
    _check_consistent(config)
    scaled = config.teacher_fp8 == "weights" and not te
    if config.fp8 or (teacher_in_fp8 and not scaled):
        _check_fp8(config, machine, te=te)
    if scaled:
        _check_scaled(config, machine)
    first, last = config.keep_bf16.first, config.keep_bf16.last
    shared = {
        "fp8_recipe": config.recipe,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }
    plain = {"cp_comm_type": _exchange(parallel, te=te)} if te else {}
    student_fp8 = {"fp8": config.fp8, **shared} if config.fp8 else {}
    # A frozen model has no gradients, which would need the range of E5M2.
    teacher_fp8 = (
        {"fp8": "e4m3", **shared, "fp8_param": config.teacher_fp8 == "weights"} if teacher_in_fp8 and te else {}
    )
    return Precision(
        ModelPrecision(
            te,
            False,
            (first, last) if config.fp8 else (0, 0),
            plain | student_fp8 | tp_overlap_arguments(parallel),
        ),
        ModelPrecision(te, scaled, (first, last) if teacher_in_fp8 else (0, 0), plain | teacher_fp8),
        _pad_tokens(config, in_te=bool(student_fp8 or teacher_fp8)),
    )


def _plan_automatic(config: PrecisionConfig, parallel: ParallelConfig, machine: Machine) -> Precision:
    """Return the precision without FP8 of the teacher, and the FP8 weights that the machine supports, if any."""
    off, weights = (config.model_copy(update={"teacher_fp8": value}) for value in ("off", "weights"))
    precision = plan_precision(off, parallel, machine)
    if not precision.teacher.transformer_engine or machine.capability is None or machine.capability < (9, 0):
        return precision
    try:
        in_fp8 = plan_precision(weights, parallel, machine)
    except UserError:
        return precision
    return replace(precision, pad_tokens=in_fp8.pad_tokens, fp8_candidate=in_fp8.teacher)


@dataclass(frozen=True)
class ModelLayout:
    """The layout of one model, and the names that error messages use."""

    parallel: ParallelConfig
    stages: Sequence[int]  # transformer layers on each pipeline stage, virtual stages counted separately
    model: str  # "student", "teacher" or "teacher NAME"
    key: str  # the section of the configuration: "parallel", "teacher.parallel" or "teachers.NAME.parallel"


def check_dimensions(precision: ModelPrecision, recipe: str, spec: ModelSpec, layout: ModelLayout) -> None:
    """Raise UserError if the model's matrix products have sizes in this layout that FP8 does not support."""
    if not precision.in_fp8:
        return
    model, key, tensor, multiple = layout.model, layout.key, layout.parallel.tensor, MULTIPLE[recipe]
    for name, size in _product_sizes(spec, tensor).items():
        if size % multiple:
            raise UserError(
                f"the {model}'s {name} is {size} on each rank with {key}.tensor={tensor}; FP8 with precision.recipe="
                f"{recipe} needs a multiple of {multiple}: lower {key}.tensor or leave FP8 out"
            )
    most = sum(layout.stages) // layout.parallel.pipeline
    for name, kept in zip(("first", "last"), precision.keep_bf16, strict=True):
        if kept > most and not precision.scaled_weights:
            raise UserError(
                f"precision.keep_bf16.{name}={kept} is more than Megatron-Core takes of the {model}, whose pipeline "
                f"stages have {most} blocks on average; use at most {most}"
            )


def check_head_exchange(precision: ModelPrecision, spec: ModelSpec, layout: ModelLayout) -> None:
    """Raise UserError if all-to-all context parallelism cannot divide the heads of a rank."""
    parallel = layout.parallel
    if precision.arguments.get("cp_comm_type") != "a2a" or parallel.context == 1:
        return
    for name, heads in (("attention heads", spec.num_attention_heads), ("key-value heads", spec.num_query_groups)):
        if heads // parallel.tensor % parallel.context:
            raise UserError(
                f"parallel.cp_comm_type=a2a divides heads over parallel.context={parallel.context}, and the "
                f"{layout.model} has {heads // parallel.tensor} {name} on each rank; use parallel.cp_comm_type=p2p"
            )


def _product_sizes(spec: ModelSpec, tensor: int) -> dict[str, int]:
    sizes = {
        "hidden size": spec.hidden_size,
        "width of query, key and value": (spec.num_attention_heads + 2 * spec.num_query_groups)
        * spec.head_dim
        // tensor,
        "width of the heads": spec.num_attention_heads * spec.head_dim // tensor,
    }
    if len(spec.sparse_layers) < spec.num_layers:
        sizes["intermediate size"] = spec.ffn_hidden_size // tensor
    if spec.num_experts:
        sizes["experts' intermediate size"] = spec.moe_ffn_hidden_size  # tensor parallelism does not divide experts
    if spec.shared_ffn_hidden_size:
        sizes["shared expert's intermediate size"] = spec.shared_ffn_hidden_size // tensor
    return sizes


def _takes_transformer_engine(config: PrecisionConfig, machine: Machine) -> bool:
    usable = machine.transformer_engine is not None and machine.capability is not None and config.dtype == "bf16"
    if config.attention != "te":
        return usable and config.attention == "auto"
    setting = "precision.attention=te"
    if machine.transformer_engine is None:
        raise UserError(f"{setting}: Transformer Engine is not installed; install it or use precision.attention=auto")
    if machine.capability is None:
        raise UserError(f"{setting}: Transformer Engine needs a CUDA device; use precision.attention=auto or sdpa")
    if config.dtype != "bf16":
        raise UserError(
            f"{setting} with precision.dtype={config.dtype}: Transformer Engine's fused attention takes bf16; use "
            "precision.dtype=bf16 or precision.attention=sdpa"
        )
    return True


def _exchange(parallel: ParallelConfig, *, te: bool) -> str:
    """Return the `cp_comm_type` of Megatron-Core: the exchange of keys and values of context-parallel ranks."""
    cp_comm_type = parallel.cp_comm_type
    if te and cp_comm_type == "all_gather" and parallel.context > 1:
        raise UserError(
            "parallel.cp_comm_type=all_gather: Transformer Engine does not gather keys and values of packed sequences; "
            "use p2p or a2a, or precision.attention=sdpa"
        )
    return "p2p" if cp_comm_type in ("auto", "all_gather") else cp_comm_type


def _check_consistent(config: PrecisionConfig) -> None:
    """Raise UserError for settings that contradict each other on every machine."""
    in_fp8 = config.fp8 is not None or config.teacher_fp8 != "off"
    if not in_fp8 and config.recipe != "tensorwise":
        raise UserError(
            f"precision.recipe={config.recipe}: nothing computes in FP8; set precision.fp8 or precision.teacher_fp8"
        )
    if config.recipe != "delayed":
        return
    if config.teacher_fp8 != "off":
        raise UserError(
            f"precision.recipe=delayed with precision.teacher_fp8={config.teacher_fp8}: a frozen model has no history "
            "of its own to scale by; use precision.recipe=tensorwise or blockwise, or precision.teacher_fp8=off"
        )
    if config.keep_bf16.first or config.keep_bf16.last:
        raise UserError(
            "precision.recipe=delayed cannot keep blocks in bf16; set precision.keep_bf16.first=0 and "
            "precision.keep_bf16.last=0, or use precision.recipe=tensorwise"
        )


def _check_fp8(config: PrecisionConfig, machine: Machine, *, te: bool) -> None:
    setting, instead = f"precision.fp8={config.fp8}", "precision.fp8=null"
    if not config.fp8:
        setting, instead = (
            f"precision.teacher_fp8={config.teacher_fp8}",
            "precision.teacher_fp8=weights, which needs none",
        )
    if config.dtype != "bf16":
        raise UserError(
            f"{setting} with precision.dtype={config.dtype}: FP8 stands beside bf16; use precision.dtype=bf16"
        )
    if machine.transformer_engine is None:
        raise UserError(
            f"{setting} needs Transformer Engine, which is not installed: Megatron-Core would ignore it; use {instead}"
        )
    if not te and machine.capability is None:
        raise UserError(f"{setting} needs a CUDA device; use {instead}")
    if not te:
        raise UserError(
            f"{setting} with precision.attention=sdpa: Megatron-Core's own linear layers ignore FP8; use "
            "precision.attention=auto or te"
        )
    version = tuple(int(part) for part in str(machine.transformer_engine).split(".")[:2])
    if version < _OLDEST_TE:
        raise UserError(
            f"{setting} needs Transformer Engine 2.10 or newer, not {machine.transformer_engine}; install that, or use "
            f"{instead}"
        )
    _check_device(setting, config.recipe, machine)


def _check_device(setting: str, recipe: str, machine: Machine) -> None:
    """Raise UserError if the device does not support the recipe (conditions of Transformer Engine)."""
    capability, cuda = machine.capability or (0, 0), machine.cuda or (0, 0)
    device = f"this device has compute capability {capability[0]}.{capability[1]}"
    if capability < (8, 9):
        raise UserError(
            f"{setting} needs compute capability 8.9 or above; {device}; use precision.fp8=null and precision."
            "teacher_fp8=off"
        )
    if recipe == "blockwise" and capability < (9, 0):
        raise UserError(
            f"precision.recipe=blockwise needs compute capability 9.0; {device}; use precision.recipe=tensorwise"
        )
    if recipe == "blockwise" and cuda < (12, 9):
        raise UserError(
            f"precision.recipe=blockwise needs CUDA 12.9 or newer, not {cuda[0]}.{cuda[1]}; use precision.recipe="
            "tensorwise"
        )
    if recipe == "mxfp8" and capability[0] != 10:
        raise UserError(
            f"precision.recipe=mxfp8 needs compute capability 10.x (Blackwell); {device}; use precision.recipe="
            "tensorwise or blockwise"
        )


def _check_scaled(config: PrecisionConfig, machine: Machine) -> None:
    """Raise UserError if a teacher cannot have FP8 weights without Transformer Engine."""
    setting = "precision.teacher_fp8=weights"
    if config.recipe != "tensorwise":
        raise UserError(
            f"{setting} with precision.recipe={config.recipe} needs Transformer Engine on a CUDA device with "
            "precision.attention=auto or te; without it use precision.recipe=tensorwise"
        )
    if machine.capability is not None:
        raise UserError(
            f"{setting} without Transformer Engine is slower than bf16 on a GPU (1.3 times on an H100); install "
            "Transformer Engine, or use precision.teacher_fp8=off"
        )


def _pad_tokens(config: PrecisionConfig, *, in_te: bool) -> int:
    needed = MULTIPLE[config.recipe] if in_te else 1
    if config.pad_tokens == "auto":
        return needed
    if config.pad_tokens % needed:
        raise UserError(
            f"precision.pad_tokens={config.pad_tokens}: FP8 with precision.recipe={config.recipe} needs a multiple of "
            f"{needed}; use that or auto"
        )
    return config.pad_tokens
