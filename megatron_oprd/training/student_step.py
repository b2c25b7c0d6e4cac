"""One update of the student (OPRD eq. (6)): forward, losses at the layers, backward, clipping, optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from megatron_oprd import platform
from megatron_oprd.config import RepresentationConfig
from megatron_oprd.losses.reduction import layer_metrics
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.micro_batch import Tap
from megatron_oprd.models.taps import StageLoss
from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.training.student import Student
from megatron_oprd.types import GlobalCounts, PackedBatch, StepReport


def student_step(
    student: Student,
    topology: Topology,
    plan: LayerPlan,
    config: RepresentationConfig,
    batches: Sequence[PackedBatch],
    targets: TeacherTargets,
    counts: GlobalCounts,
) -> StepReport:
    """Update the student once on the whole global batch; the report is the same on every rank.

    `batches` are this rank's micro-batches, `targets` the teacher states that its layers are compared with; none are
    left at the end. Communicates over all groups.
    """
    taps: list[StageLoss] = []

    def next_taps() -> Iterator[StageLoss]:
        for number, batch in enumerate(batches):
            tap = StageLoss(batch, targets.of(number), len(plan.pairs), normalize=config.normalize, scale=config.weight)
            taps.append(tap)
            yield tap

    accumulate_gradients(student, topology, plan, batches, next_taps())
    if len(targets):
        raise RuntimeError(f"{len(targets)} layers of micro-batches were never compared with their targets")
    learning_rate = student.scheduler.get_lr({})
    with platform.cpu_devices():
        _, grad_norm, _ = student.optimizer.step()  # the norm before clipping
    student.scheduler.step(increment=1)
    metrics = layer_metrics(_global_sums(taps, topology, plan), counts)
    return StepReport(config.weight * metrics["rep/mse"], float(grad_norm), learning_rate, metrics)


def accumulate_gradients(
    student: Student, topology: Topology, plan: LayerPlan, batches: Sequence[PackedBatch], taps: Iterable[Tap]
) -> None:
    """Forward and backward of all micro-batches from zero gradients, reduced over the ranks. Communicates over all
    groups."""
    for chunk in student.ddp:
        chunk.train()
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()
    run_schedule(
        student.ddp,
        topology,
        batches,
        taps,
        last_layer=plan.student_last_layer,
        normed_layer=plan.student_normed_layer,
        forward_only=False,
    )


def _global_sums(taps: Sequence[StageLoss], topology: Topology, plan: LayerPlan) -> dict[int, list[float]]:
    """Sums [4] of every compared student layer over micro-batches, ranks that hold other tokens, and pipeline ranks."""
    layers = plan.student_layers
    local = torch.zeros(len(layers), 4, dtype=torch.float64, device=topology.device)
    for tap in taps:
        for layer, sums in tap.sums.items():
            local[layers.index(layer)] += sums
    values = local.flatten().tolist()
    groups = [topology.groups.dp_cp, topology.groups.pp]
    if topology.sequence_parallel:
        groups.append(topology.groups.tp)  # else each of its ranks holds every row
    for group in groups:
        values = sum_over(values, group, topology.device)
    return {layer: values[4 * i : 4 * i + 4] for i, layer in enumerate(layers)}
