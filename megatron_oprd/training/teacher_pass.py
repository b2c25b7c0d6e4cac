"""The teacher reads the student's rollouts; only the states that the loss compares are kept."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import HiddenStateModel
from megatron_oprd.models.taps import CaptureTap
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.types import PackedBatch, TeacherTargets


def teacher_pass(
    teacher: HiddenStateModel, topology: Topology, plan: LayerPlan, batches: Sequence[PackedBatch]
) -> list[TeacherTargets]:
    """States [selected tokens, hidden] of the compared teacher layers of this stage, for each micro-batch.

    Each is born on the rank that will read it (see `LayerPlan`). Communicates over the tensor- and pipeline-parallel
    groups. Memory: layers of this stage x selected tokens x hidden.
    """
    layers = frozenset(plan.teacher_of.values())
    taps = [CaptureTap(layers, batch.selected) for batch in batches]
    run_schedule(
        teacher, topology, batches, taps, last_layer=None, normed_layer=plan.teacher_normed_layer, forward_only=True
    )
    return [TeacherTargets(tap.states) for tap in taps]
