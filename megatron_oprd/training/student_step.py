"""One update of the student: forward, losses where the states are (OPRD eq. (6)), backward, clipping, optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_oprd.config import LossConfig
from megatron_oprd.losses.output_space import METRICS
from megatron_oprd.losses.reduction import layer_metrics, layer_weights, output_metrics
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.models.projection import StudentMap
from megatron_oprd.models.tap_params import Tap
from megatron_oprd.models.taps import OutputTap, StageLoss, StudentTap
from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.overlap import start_gather
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.training.student import Student
from megatron_oprd.types import FINAL_STATES, PackedBatch, StepReport


def student_step(
    student: Student,
    topology: Topology,
    plan: LayerPlan,
    loss: LossConfig,
    whole: GlobalBatch,
    batches: Sequence[PackedBatch],
    targets: TeacherTargets,
    output: OutputLoss | None = None,
    *,
    with_metrics: bool = False,
) -> StepReport:
    """Update the student once on the whole global batch; the report is the same on every rank.

    `batches` are this rank's micro-batches, `targets` the teacher states that its layers are compared with; none are
    left at the end. `output`: the output-space objective, on the last stage; `with_metrics`: whether it measures its
    metrics. Communicates over all groups.
    """
    taps: list[StudentTap] = []

    def next_taps() -> Iterator[StudentTap]:
        for number, batch in enumerate(batches):
            taps.append(stage_loss(plan, loss, batch, targets, number, output, student.maps))
            yield taps[-1]

    accumulate_gradients(student, topology, plan, batches, next_taps())
    if len(targets):
        raise RuntimeError(f"{len(targets)} layers of micro-batches were never compared with their targets")
    learning_rate = student.scheduler.get_lr({})
    with cpu_stand_ins.cpu_devices():
        _, grad_norm, _ = student.optimizer.step()  # the norm before clipping
    start_gather(student.ddp)
    if student.map_optimizer is not None:
        student.map_optimizer.step(learning_rate)
    student.scheduler.step(increment=1)
    total, metrics = 0.0, {}
    if plan.pairs:
        metrics |= layer_metrics(_layer_sums(taps, topology, plan), whole.representation.counts)
        total += loss.representation.weight * metrics["rep/mse"]
    if plan.output:
        metrics |= output_metrics(_output_sums(taps, topology), whole.output.counts, with_metrics=with_metrics)
        total += loss.output.weight * metrics["output/loss"]
    return StepReport(total, float(grad_norm), learning_rate, metrics)


def stage_loss(
    plan: LayerPlan,
    loss: LossConfig,
    batch: PackedBatch,
    targets: TeacherTargets,
    number: int,
    output: OutputLoss | None,
    maps: Mapping[int, StudentMap] | None = None,
) -> StudentTap:
    """The tap of the student's micro-batch `number`."""
    config, weights, own_targets = loss.representation, batch.representation.weights, targets.of(number)
    layers = StageLoss(
        batch.representation.selected,
        config.weight * layer_weights(weights, max(len(plan.pairs), 1)),
        own_targets,
        normalize=config.normalize,
        metric_weights=weights,
        maps=maps,
        release=own_targets.release,
    )
    if output is None or FINAL_STATES not in own_targets:
        return StudentTap(layers, None)
    return StudentTap(layers, OutputTap(output, batch.output, partial(own_targets.take, FINAL_STATES)))


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


def _layer_sums(taps: Sequence[StudentTap], topology: Topology, plan: LayerPlan) -> dict[int, list[float]]:
    """Sums [4] of every compared student layer over micro-batches, ranks that hold other tokens, and pipeline ranks."""
    layers = plan.student_layers
    local = torch.zeros(len(layers), 4, dtype=torch.float64, device=topology.device)
    for tap in taps:
        for layer, sums in tap.layers.sums.items():
            local[layers.index(layer)] += sums
    values = _sum_over_all(local, [*topology.token_groups, topology.groups.pp], topology)
    return {layer: values[4 * i : 4 * i + 4] for i, layer in enumerate(layers)}


def _output_sums(taps: Sequence[StudentTap], topology: Topology) -> list[float]:
    """Sums [1 + METRICS] of the output-space objective; tensor-parallel ranks have all of them alike."""
    local = torch.zeros(1 + len(METRICS), dtype=torch.float64, device=topology.device)
    for tap in taps:
        if tap.output is not None and tap.output.sums is not None:
            local += tap.output.sums
    return _sum_over_all(local, [topology.groups.dp_cp, topology.groups.pp], topology)


def _sum_over_all(local: torch.Tensor, groups: Sequence[dist.ProcessGroup], topology: Topology) -> list[float]:
    values: list[float] = local.flatten().tolist()
    for group in groups:
        values = sum_over(values, group, topology.device)
    return values
