"""What a configuration would run, told without running it."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from megatron_oprd.config import Config, ParallelConfig, dump_config
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.training.memory import count_parameters, predict_memory
from megatron_oprd.types import ModelSpec


def describe_run(
    config: Config, student: ModelSpec, teacher: ModelSpec, plan: LayerPlan, own_layout: ParallelConfig | None
) -> None:
    """Print the resolved configuration, the layer pairs with their pipeline stages, parameters and predicted memory.

    `own_layout`: of a teacher that has one. The first of several processes prints. No communication.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    console = Console()
    console.print(dump_config(config), markup=False, highlight=False)
    pairs = Table("student layer", "teacher layer", "pipeline stage", title="Compared layers")
    for pair in plan.pairs:
        normed = " (after the final norm)" if pair.student == plan.student_normed_layer else ""
        pairs.add_row(f"{pair.student}{normed}", str(pair.teacher), _place(plan, pair.student))
    console.print(pairs)
    console.print(
        "teacher states are born where they are compared"
        if plan.aligned
        else "teacher states travel from the teacher's layout to the student's"
    )
    console.print(f"student: {student.architecture}, {count_parameters(student):,} parameters")
    console.print(
        f"teacher: {teacher.architecture}, {count_parameters(teacher):,} parameters, built up to layer "
        f"{sum(plan.teacher_stages)} of {plan.teacher_depth} and without LM head"
    )
    memory = Table("on the fullest rank", "GiB (predicted)", title=f"Memory, {world_size} processes")
    predicted = predict_memory(config, student, teacher, plan, own_layout, world_size)
    for purpose, size in {**predicted, "sum": sum(predicted.values())}.items():
        memory.add_row(purpose, f"{size / 2**30:.3f}")
    console.print(memory)


def _place(plan: LayerPlan, layer: int) -> str:
    chunk, rank = plan.student_place(layer)
    return f"{rank}, chunk {chunk}" if len(plan.student_stages) > plan.pipeline_size else str(rank)
