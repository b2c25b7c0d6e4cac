"""Check that layouts suit the models, the processes and the machine, before any of them is used."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from megatron_oprd.config import Config, ParallelConfig, teacher_section, teacher_title
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import check_divisible, check_recompute
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher, even_stages, make_plan
from megatron_oprd.models.precision import ModelLayout, Precision, check_dimensions, check_head_exchange
from megatron_oprd.models.recompute import available_parts, check_parts
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.runtime.environment import Machine
from megatron_oprd.types import UserError

# Keys of `parallel` that concern the student's training only. A teacher's layout has none of them.
ONLY_IN_TRAINING = (
    "distributed_optimizer",
    "world_size",
    "cp_comm_type",
    "overlap_grad_reduce",
    "overlap_param_gather",
)


def plan_teacher(
    config: Config, student: ModelSpec, teacher: ModelSpec, name: str = "", world: int | None = None
) -> PlannedTeacher:
    """Plan the compared layers of one teacher and the pipeline stages that own them.

    Args:
        config: The configuration.
        student: The student's shape.
        teacher: The teacher's shape.
        name: The data_source of the teacher; "" for a single teacher.
        world: The number of processes; None: the number that torchrun started.

    Raises:
        UserError: A layer does not exist, or a layout does not suit the models or the processes.
    """
    own_layout = teacher_layout(config, name)
    section = teacher_section(name)
    plan = make_plan(
        config.loss,
        student,
        teacher,
        config.parallel,
        own_layout,
        section,
    )
    if config.named_teachers[name].follows_student:
        if own_layout:
            raise UserError(
                f"{section}.ema needs a teacher in the student's layout, because both are averaged on the same ranks; "
                f"leave {section}.parallel out"
            )
        plan = plan.along_student()
    _check_scheduled_overlap(config, plan)
    check_student_layout(config.parallel, student, None if own_layout else teacher, name)
    if own_layout:
        key = f"{section}.parallel"
        check_layout(own_layout, world or world_size(), key=key)
        check_experts(own_layout.expert, [teacher], key=key)
        check_divisible(teacher, own_layout.tensor, own_layout.expert, key=key, model=teacher_title(name))
        check_window(teacher, own_layout, key, teacher_title(name))
    check_recompute(config.recompute, plan.student_stages, config.parallel.pipeline)
    return PlannedTeacher(config.named_teachers[name], teacher, own_layout, plan)


def _check_scheduled_overlap(config: Config, plan: LayerPlan) -> None:
    """Raise UserError if gradients are reduced during backward, and some steps train fewer parts of the student.

    A bucket of gradients is reduced once backward has reached all of its parameters.
    """
    schedule = config.loss.schedule
    if schedule is None or not config.parallel.overlap_grad_reduce:
        return
    for step in schedule.steps:
        of_step = plan.for_loss(config.loss.at(step))
        if (of_step.student_last_layer, of_step.student_final_norm) != (
            plan.student_last_layer,
            plan.student_final_norm,
        ):
            raise UserError(
                f"parallel.overlap_grad_reduce=true needs steps that all train the same layers, and loss.schedule "
                f"trains up to layer {of_step.student_last_layer} of {plan.student_last_layer} after {step} updates; "
                "use loss.representation.layers=last or all, or parallel.overlap_grad_reduce=false"
            )


def plan_student(config: Config, student: ModelSpec) -> tuple[int, ...]:
    """Return the number of transformer layers on each pipeline stage of a student that runs without a teacher.

    Raises UserError, naming what would work, for a layout that does not suit the student.
    """
    parallel = config.parallel
    stages = even_stages(student.num_layers, parallel.pipeline, parallel.virtual_pipeline or 1)
    check_student_layout(parallel, student)
    check_recompute(config.recompute, stages, parallel.pipeline)
    return stages


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def planned_world(parallel: ParallelConfig, *, dry_run: bool = False) -> int:
    """Return the number of processes of a run. A dry run without torchrun is planned for `parallel.world_size`.

    Raises UserError if torchrun started another number than `parallel.world_size`.
    """
    configured, started = parallel.world_size, world_size()
    if dry_run and "WORLD_SIZE" not in os.environ:
        return configured or 1
    if configured and configured != started:
        raise UserError(
            f"parallel.world_size={configured}: the layout is made for {configured} processes, and torchrun started "
            f"{started}; start {configured}, or set parallel.world_size=null to try the layout on {started}"
        )
    return started


def teacher_layout(config: Config, name: str = "") -> ParallelConfig | None:
    """Return the teacher's own layout; None if the teacher runs in the student's layout or in an equal one."""
    own, student = config.named_teachers[name].parallel, config.parallel
    if own is None:
        return None
    layout = ParallelConfig(tensor=own.tensor, pipeline=own.pipeline, expert=own.expert)
    training_keys = {name: getattr(student, name) for name in ONLY_IN_TRAINING}
    return None if layout.model_copy(update=training_keys) == student else layout


def check_tp_overlap(config: Config, machine: Machine) -> None:
    """Raise UserError if `parallel.tp_comm_overlap` needs another machine or another `precision.pad_tokens`."""
    parallel, pad_tokens = config.parallel, config.precision.pad_tokens
    if not parallel.tp_comm_overlap:
        return
    _check_te("parallel.tp_comm_overlap=true", "parallel.tp_comm_overlap=false", machine)
    if pad_tokens == "auto":  # Transformer Engine copies only micro-batches that fill its buffers
        raise UserError(
            "parallel.tp_comm_overlap=true needs micro-batches of one length; set precision.pad_tokens to the "
            "tokens of a rank in the fullest one"
        )
    fullest = -(-config.batch.max_tokens_per_micro_batch // (parallel.tensor * parallel.context))
    if pad_tokens < fullest:
        raise UserError(
            f"parallel.tp_comm_overlap=true needs micro-batches of one length, and precision.pad_tokens="
            f"{pad_tokens} is less than a rank has of the fullest one; set it to {fullest} or "
            "lower batch.max_tokens_per_micro_batch"
        )


def check_optimizer(config: Config, machine: Machine) -> None:
    """Raise UserError if the other settings or this machine do not allow the optimizer or its overlap."""
    parallel, optimizer = config.parallel, config.optimizer
    if parallel.overlap_param_gather and optimizer.name != "adamw":
        raise UserError(
            "parallel.overlap_param_gather=true gathers what a distributed optimizer updates, and "
            f"optimizer.name={optimizer.name} is none; use adamw or parallel.overlap_param_gather=false"
        )
    if optimizer.precision_aware and optimizer.cpu_offload:
        raise UserError(
            f"optimizer.precision_aware=true and optimizer.cpu_offload={optimizer.cpu_offload}: a state in CPU memory "
            "is float32; use one of them"
        )
    if optimizer.precision_aware:
        _check_lean_state("optimizer.precision_aware=true", "optimizer.precision_aware=false", config, machine)
    if optimizer.cpu_offload:
        _check_lean_state(f"optimizer.cpu_offload={optimizer.cpu_offload}", "optimizer.cpu_offload=0", config, machine)


def _check_lean_state(setting: str, otherwise: str, config: Config, machine: Machine) -> None:
    """Raise UserError if Megatron-Core's optimizers with less state on the GPU cannot be used."""
    if config.optimizer.name != "adamw" or not config.parallel.distributed_optimizer:
        raise UserError(
            f"{setting} needs optimizer.name=adamw and parallel.distributed_optimizer=true; set both or {otherwise}"
        )
    if config.precision.dtype != "bf16":
        raise UserError(f"{setting} needs precision.dtype=bf16; set it or {otherwise}")
    _check_te(setting, otherwise, machine)


def _check_te(setting: str, otherwise: str, machine: Machine) -> None:
    on_gpu = machine.capability is not None
    if not (machine.transformer_engine and on_gpu):
        missing = "Transformer Engine, which is not installed" if on_gpu else "a CUDA device, and this process has none"
        raise UserError(f"{setting} needs {missing}; use {otherwise}")


def check_window(spec: ModelSpec, parallel: ParallelConfig, key: str, model: str) -> None:
    """Raise UserError if context parallelism would divide the sequences of a model with sliding windows."""
    if spec.windowed_layers and parallel.context > 1:
        raise UserError(
            f"{key}.context={parallel.context} does not support the {model}'s sliding window of {spec.sliding_window} "
            f"tokens; use {key}.context=1"
        )


def check_student_layout(
    parallel: ParallelConfig, student: ModelSpec, teacher: ModelSpec | None = None, name: str = ""
) -> None:
    """Raise UserError if the student's layout does not suit the student, or the teacher `name` that shares it."""
    models = {"student": student} if teacher is None else {"student": student, teacher_title(name): teacher}
    check_experts(parallel.expert, list(models.values()))
    for model, spec in models.items():
        check_divisible(spec, parallel.tensor, parallel.expert, model=model)
        check_window(spec, parallel, "parallel", model)
    if student.num_experts and parallel.tensor > 1 and not parallel.sequence:
        raise UserError(
            f"parallel.tensor={parallel.tensor} with a student of {student.num_experts} experts needs "
            "parallel.sequence=true: Megatron-Core trains experts on divided tokens only"
        )


def check_precision(
    config: Config,
    precision: Precision,
    student: ModelSpec,
    student_stages: Sequence[int],
    teachers: Mapping[str, PlannedTeacher],
) -> None:
    """Raise UserError if the precision does not support the sizes of a model in its layout."""
    recipe, parallel = config.precision.recipe, config.parallel
    for model, spec in {"student": student, **{teacher_title(name): of.spec for name, of in teachers.items()}}.items():
        own = precision.student if model == "student" else precision.teacher
        if spec.linear_layers and (own.transformer_engine or own.in_fp8):
            raise UserError(
                f"the {model} has Gated DeltaNet layers, which run without Transformer Engine and FP8; use "
                "precision.attention=sdpa, precision.fp8=null and precision.teacher_fp8=off"
            )
    te, fp8 = precision.student.transformer_engine, config.precision.fp8 is not None
    check_parts(config.recompute, available_parts(student, transformer_engine=te, fp8=fp8))
    layout = ModelLayout(parallel, student_stages, "student", "parallel")
    check_dimensions(precision.student, recipe, student, layout)
    check_head_exchange(precision.student, student, layout)
    _check_teachers(config, precision, teachers)


def _check_teachers(config: Config, precision: Precision, teachers: Mapping[str, PlannedTeacher]) -> None:
    recipe, parallel = config.precision.recipe, config.parallel
    for name, teacher in teachers.items():
        key = f"{teacher_section(name)}.parallel" if teacher.layout else "parallel"
        layout = ModelLayout(teacher.layout or parallel, teacher.plan.teacher_stages, teacher_title(name), key)
        check_dimensions(precision.teacher, recipe, teacher.spec, layout)
        check_head_exchange(precision.teacher, teacher.spec, layout)


def supports_fp8_candidate(config: Config, precision: Precision, teachers: Mapping[str, PlannedTeacher]) -> bool:
    """Return True if the error of the teachers in FP8 can be measured in step 1, and their sizes support FP8.

    A teacher that follows the student has other weights after each update, which FP8 would round.
    """
    follows = any(teacher.config.follows_student for teacher in teachers.values())
    if precision.fp8_candidate is None or follows or not config.loss.at(0).reads_layers:
        return False
    candidate = dataclasses.replace(precision, teacher=precision.fp8_candidate)
    try:
        _check_teachers(config, candidate, teachers)
    except UserError:
        return False
    return True


def check_experts(expert: int, specs: Sequence[ModelSpec], key: str = "parallel") -> None:
    """Raise UserError for expert parallelism of models without experts. `key` is the section of the layout."""
    if expert > 1 and not any(spec.num_experts for spec in specs):
        raise UserError(f"{key}.expert={expert}: the model has no experts; use {key}.expert=1")
