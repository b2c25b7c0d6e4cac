"""Build the student before its training as a frozen model, to compare it with the trained one on the same tokens."""

from __future__ import annotations

import dataclasses

from megatron_oprd.config import LossConfig, TeacherConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.assemble import Run
from megatron_oprd.launch.models import build_teacher
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import PlannedTeacher, make_plan
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.types import UserError


def check_before(folder: str, student: ModelSpec) -> ModelSpec:
    """Return the shape of the student before its training. Raises UserError if it is not that of the student."""
    spec = read_model_spec(folder)
    for name in ("num_layers", "hidden_size"):
        before, now = getattr(spec, name), getattr(student, name)
        if before != now:
            raise UserError(
                f"--before {folder}: its {name} is {before}, that of the student {now}; name an earlier state of the "
                "same model"
            )
    return spec


def build_before(run: Run, folder: str) -> Teacher:
    """Return the model in `folder` up to the highest compared layer of the student, in the student's layout.

    Its plan pairs each compared layer of the student with itself. Collective over the world.
    """
    config, setup, (teacher,) = run.inputs.config, run.inputs.setup, run.teachers
    spec = check_before(folder, setup.student)
    pairs = [(pair.student, pair.student) for pair in teacher.plan.pairs]
    term = config.loss.representation.model_copy(update={"pairs": pairs, "bridge": None})
    plan = make_plan(LossConfig(representation=term), setup.student, spec, config.parallel)
    planned = PlannedTeacher(TeacherConfig(path=folder), spec, None, plan)
    precision = dataclasses.replace(setup.precision, teacher=setup.precision.exact_teacher)
    inputs = dataclasses.replace(
        run.inputs.model_inputs,
        setup=dataclasses.replace(setup, precision=precision),
        bridge={},
        own_teacher_prompts=False,
    )
    before = build_teacher(inputs, planned, run.topology)
    return dataclasses.replace(before, row_width=spec.hidden_size)
