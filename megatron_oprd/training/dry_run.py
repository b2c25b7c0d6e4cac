"""What a configuration would run, told without running it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from megatron_oprd.config import Config, dump_config
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.training.memory import count_parameters, predict_memory
from megatron_oprd.types import ModelSpec


def describe_run(config: Config, student: ModelSpec, teachers: Mapping[str, PlannedTeacher]) -> None:
    """Print the resolved configuration, the layer pairs with their pipeline stages, parameters and predicted memory.

    The first of several processes prints. No communication.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    console = Console()
    console.print(dump_config(config), markup=False, highlight=False)
    console.print(f"student: {student.architecture}, {count_parameters(student):,} parameters")
    for name, teacher in teachers.items():
        _describe_teacher(console, name, teacher)
    memory = Table("on the fullest rank", "GiB (predicted)", title=f"Memory, {world_size} processes")
    predicted = predict_memory(config, student, list(teachers.values()), world_size)
    for purpose, size in {**predicted, "sum": sum(predicted.values())}.items():
        memory.add_row(purpose, f"{size / 2**30:.3f}")
    console.print(memory)


def _describe_teacher(console: Console, name: str, teacher: PlannedTeacher) -> None:
    plan, spec = teacher.plan, teacher.spec
    title = f"teacher {name}" if name else "teacher"
    if plan.pairs:
        pairs = Table("student layer", "teacher layer", "pipeline stage", title=f"Compared layers, {title}")
        for pair in plan.pairs:
            normed = " (after the final norm)" if pair.student == plan.student_normed_layer else ""
            pairs.add_row(f"{pair.student}{normed}", str(pair.teacher), _place(plan, pair.student))
        console.print(pairs)
    head = "with its LM head on the student's last stage" if plan.output else "without LM head"
    console.print(
        f"{title}: {spec.architecture}, {count_parameters(spec):,} parameters, built up to layer "
        f"{sum(plan.teacher_stages)} of {plan.teacher_depth} and {head}"
    )
    console.print(
        f"{title}: its states are born where they are compared"
        if plan.aligned
        else f"{title}: its states travel from its layout to the student's"
    )


def _place(plan: LayerPlan, layer: int) -> str:
    chunk, rank = plan.student_place(layer)
    return f"{rank}, chunk {chunk}" if len(plan.student_stages) > plan.pipeline_size else str(rank)
