"""The models of a run, their layouts, layer plans and precision: read and checked before any model is built."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.checkpoint.megatron_lm import is_megatron_lm
from megatron_oprd.checkpoint.weights import check_weights
from megatron_oprd.config import BatchConfig, Config, ModelFolder, RecomputeConfig, TeacherConfig, teacher_section
from megatron_oprd.config.section import Section
from megatron_oprd.data.end_tokens import EndTokens
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.layouts import (
    check_optimizer,
    check_precision,
    check_tp_overlap,
    plan_student,
    plan_teacher,
    planned_world,
    supports_fp8_candidate,
)
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.models.precision import Precision, plan_precision
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.runtime import platform
from megatron_oprd.runtime.environment import Machine, find_machine
from megatron_oprd.runtime.files import check_writable
from megatron_oprd.runtime.loaded_libraries import find_doubled_library
from megatron_oprd.types import UserError

# The device that a dry run plans for on a machine without a GPU.
DRY_RUN_MACHINE = Machine("2.11.0", (9, 0), (13, 0))
DRY_RUN_DEVICE = "an H100 with Transformer Engine 2.11"
DEFAULT_TOKENS: int = BatchConfig.model_fields["max_tokens_per_micro_batch"].default


@dataclass(frozen=True)
class Setup:
    """The models of a run, and how they are divided over processes and computed."""

    student: ModelSpec
    student_stages: tuple[int, ...]  # transformer layers on each pipeline stage of the student
    teachers: dict[str, PlannedTeacher]  # by data_source; the name of a single teacher is ""; empty in an evaluation
    precision: Precision
    world_size: int
    planned_device: str | None  # a dry run on a machine without a GPU: the device that it plans for

    @property
    def layer_plan(self) -> LayerPlan:
        """Return the layer plan of the first teacher. All teachers are compared at the same student layers."""
        return next(iter(self.teachers.values())).plan

    @property
    def teacher_folders(self) -> list[str]:
        """Return the folders of the teachers and of the bases from which their states are extrapolated."""
        return [folder for teacher in self.teachers.values() for folder in teacher.folders]

    @property
    def widest_teacher(self) -> int:
        """Return the largest hidden size of the teachers."""
        return max(teacher.spec.hidden_size for teacher in self.teachers.values())

    @property
    def widest_final_states(self) -> int:
        """Return the largest width of the final states of a teacher, which the states of its base may follow."""
        return max(
            teacher.spec.hidden_size * (1 + teacher.config.extrapolates_output) for teacher in self.teachers.values()
        )


def with_end_tokens(setup: Setup, end_tokens: EndTokens) -> Setup:
    """Return the setup with the tokens at which the student's answers stop."""
    return dataclasses.replace(setup, student=dataclasses.replace(setup.student, eos_token_ids=end_tokens.ids))


def read_setup(
    config: Config, teachers: Mapping[str, TeacherConfig], *, trains: bool = True, dry_run: bool = False
) -> Setup:
    """Read the models' `config.json` and plan layouts, layers and precision. No communication.

    Every command plans with this function, so that a mistake gives the same error from all of them.

    Args:
        config: The configuration.
        teachers: The teachers that the command uses, by data_source. Empty for an evaluation.
        trains: True if an optimizer updates the student.
        dry_run: True if nothing runs: the number of processes and the device may then differ from those planned for.

    Raises:
        UserError: The models, the layouts, the precision and this machine do not fit together.
    """
    platform.choose_device(config.train.device)
    check_writable(config.train.run_dir)
    world_size = planned_world(config.parallel, dry_run=dry_run)
    check_layout(config.parallel, world_size)
    precision, planned_device = _plan_precision(config, trains=trains, dry_run=dry_run)
    if not dry_run:
        check_libraries(precision)
    student = _read_spec("student", config.student)
    specs = {name: _read_spec(teacher_section(name), teacher) for name, teacher in teachers.items()}
    for name, teacher in teachers.items():
        _check_base(teacher, specs[name], teacher_section(name))
        _check_average(teacher, specs[name], student, teacher_section(name))
    planned = {name: plan_teacher(config, student, spec, name, world_size) for name, spec in specs.items()}
    stages = next((teacher.plan.student_stages for teacher in planned.values()), None) or plan_student(config, student)
    check_precision(config, precision, student, stages, planned)
    if precision.fp8_candidate is not None and not (trains and supports_fp8_candidate(config, precision, planned)):
        precision, _ = _plan_precision(without_teacher_fp8(config), trains=trains, dry_run=dry_run)
    return Setup(student, stages, planned, precision, world_size, planned_device)


def _check_base(teacher: TeacherConfig, spec: ModelSpec, section: str) -> None:
    """Raise UserError if the base of a teacher is a model of another shape. The teacher's spec builds both."""
    if teacher.base is None or not teacher.extrapolates:
        return
    differences = _differences(_read_spec(f"{section}.base", teacher.base), spec)
    if differences:
        raise UserError(
            f"{section}.base.path={teacher.base.path} has {differences}; a base is the model that the teacher was "
            "trained from, of the same shape"
        )


def _check_average(teacher: TeacherConfig, spec: ModelSpec, student: ModelSpec, section: str) -> None:
    """Raise UserError if a teacher that follows the student is a model of another shape."""
    if teacher.follows_student and (differences := _differences(spec, student)):
        raise UserError(
            f"{section}.path={teacher.path} has {differences}, and {section}.ema={teacher.ema:g} averages the weights "
            "of teacher and student; name the student's first weights as the teacher's path, or use ema null"
        )


def _differences(spec: ModelSpec, expected: ModelSpec) -> str:
    """Return how the shape of a model differs from the expected one, in words; '' if it does not.

    The models may stop at other tokens and have been made for other numbers of positions.
    """
    ignored = {"eos_token_ids": (), "max_position_embeddings": 0}
    one, other = (dataclasses.replace(model, **ignored) for model in (spec, expected))
    names = [field.name for field in dataclasses.fields(ModelSpec) if field.compare]
    return ", ".join(
        f"{name} {getattr(one, name)} instead of {getattr(other, name)}"
        for name in names
        if getattr(one, name) != getattr(other, name)
    )


def _read_spec(section: str, model: ModelFolder) -> ModelSpec:
    """Read the config.json of a model. Raises UserError if a checkpoint of Megatron-LM needs a folder with one."""
    if is_megatron_lm(model.path) and not (Path(model.model_files) / "config.json").exists():
        raise UserError(
            f"{section}.path={model.path} is a checkpoint of Megatron-LM, and {model.model_files} has no config.json; "
            f"name the Hugging Face folder of its model as {section}.hf, or convert it: megatron-oprd convert "
            f"--checkpoint {model.path} --hf TOKENIZER_FOLDER --megatron NEW_FOLDER"
        )
    return read_model_spec(model.model_files)


def with_dtype(config: Config) -> Config:
    """Return the configuration with bf16 or fp32 in place of `precision.dtype=auto`. No communication.

    auto is bf16 with a CUDA device, and for settings that only bf16 has. On a CPU auto is fp32, which is faster there.
    """
    precision = config.precision
    if precision.dtype != "auto":
        return config
    needs_bf16 = (
        precision.fp8 is not None
        or precision.first_teacher_fp8 != "off"
        or precision.attention == "te"
        or config.optimizer.precision_aware
        or config.optimizer.cpu_offload > 0
    )
    on_cpu = platform.choose_device(config.train.device).type == "cpu"
    dtype = "fp32" if on_cpu and not needs_bf16 else "bf16"
    return config.model_copy(update={"precision": precision.model_copy(update={"dtype": dtype})})


def without_teacher_fp8(config: Config) -> Config:
    """Return the configuration without FP8 of the teacher."""
    return config.model_copy(update={"precision": config.precision.model_copy(update={"teacher_fp8": "off"})})


def without_automatic(config: Config, tokens: int = DEFAULT_TOKENS) -> Config:
    """Return the configuration with numbers in place of `auto`: no recomputation, and micro-batches of `tokens`."""
    update: dict[str, Section] = {}
    if config.recompute.granularity == "auto":
        update["recompute"] = RecomputeConfig()
    if config.batch.max_tokens_per_micro_batch == "auto":
        update["batch"] = config.batch.model_copy(update={"max_tokens_per_micro_batch": tokens})
    return config.model_copy(update=update)


def check_model_weights(config: Config, setup: Setup, skipped: tuple[str, ...] = ()) -> None:
    """Raise UserError if the weights in a model folder are missing, truncated or of another model.

    Reads no weights. Folders in `skipped` are not checked.
    """
    models = [(path, teacher.spec) for teacher in setup.teachers.values() for path in teacher.folders]
    for path, spec in [(config.student.path, setup.student), *models]:
        if path not in skipped:
            check_weights(path, spec)


def check_libraries(precision: Precision) -> None:
    """Raise UserError if Transformer Engine would run with parts of two cuDNN installations, which ends in a crash.

    Print a warning for any other CUDA library with two installations. No communication.
    """
    doubled = find_doubled_library()
    if doubled is None:
        return
    uses_te = precision.student.transformer_engine or precision.teacher.transformer_engine
    if doubled.library == "cuDNN" and uses_te:
        raise UserError(str(doubled))
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {doubled}", flush=True)


def _plan_precision(config: Config, *, trains: bool, dry_run: bool) -> tuple[Precision, str | None]:
    """Return the precision, and the device if a dry run plans for another machine than this one."""

    def plan(machine: Machine) -> Precision:
        if trains:
            check_optimizer(config, machine)
        check_tp_overlap(config, machine)
        return plan_precision(config.precision, config.parallel, machine)

    machine = find_machine()
    try:
        return plan(machine), None
    except UserError:
        if not dry_run or machine.capability is not None or config.train.device == "cpu":
            raise
    return plan(DRY_RUN_MACHINE), DRY_RUN_DEVICE
