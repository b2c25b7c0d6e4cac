"""Update the student: forward with the losses at the layers (OPRD eq. (6)), backward, clipping, optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist

from megatron_oprd.config import LossConfig
from megatron_oprd.losses.output_space import METRICS
from megatron_oprd.losses.reduction import layer_metrics, layer_weights, output_metrics
from megatron_oprd.models.flow_tap import FlowTap, FlowTerms
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.models.tap_params import Tap
from megatron_oprd.models.taps import OutputTap, StageLoss, StudentTap
from megatron_oprd.models.targets import MicroBatchTargets, TeacherTargets
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.layer_squares import mean_squares
from megatron_oprd.training.overlap import start_gather
from megatron_oprd.training.schedule import PassSettings, run_schedule
from megatron_oprd.training.student import Student
from megatron_oprd.types import FINAL_STATES, DeviceBatch, FlowKey, StepReport


def student_step(
    student: Student,
    global_batch: GlobalBatch,
    micro_batches: Sequence[DeviceBatch],
    targets: TeacherTargets,
    output: OutputLoss | None = None,
    *,
    with_metrics: bool = False,
) -> StepReport:
    """Update the student once on the whole global batch.

    Args:
        student: this rank's chunks.
        global_batch: the rollouts of the step.
        micro_batches: this rank's micro-batches, `global_batch.micro_batches(student.topology)`.
        targets: the teacher states for the student's layers on this rank. All of them are used up.
        output: the output-space objective, on the ranks of the student's last stage.
        with_metrics: True on every rank if `output` measures its metrics.

    Returns: the report, the same on every rank.
    Communicates over: all groups.
    Raises: RuntimeError if targets are left over.
    """
    loss = global_batch.loss
    student = dataclasses.replace(student, plan=student.plan.for_loss(loss))
    plan, topology = student.plan, student.topology
    taps: list[StudentTap] = []

    def next_taps() -> Iterator[StudentTap]:
        for number, batch in enumerate(micro_batches):
            taps.append(stage_loss(student, loss, batch, targets.of(number), output, global_batch.layer_factors))
            yield taps[-1]

    accumulate_gradients(student, micro_batches, next_taps())
    if len(targets):
        raise RuntimeError(f"{len(targets)} layers of micro-batches were never compared with their targets")
    learning_rate = student.scheduler.get_lr({})
    with cpu_stand_ins.cpu_devices():
        _, grad_norm, _ = student.optimizer.step()  # the norm before clipping
    start_gather(student.ddp)
    if student.map_optimizer is not None and plan.pairs:
        student.map_optimizer.step(learning_rate)
    if student.average is not None:
        student.average.update()
    student.scheduler.step(increment=1)
    total, metrics, squares = 0.0, {}, {}
    if plan.pairs:
        counts = global_batch.representation.counts
        metrics |= layer_metrics(_layer_sums(taps, topology, plan), counts)
        total += loss.representation.weight * _weighted_mean(metrics, global_batch.layer_factors)
        if loss.representation.layer_weights == "inverse_square" and counts.tokens:
            squares = mean_squares(_layer_squares(taps, plan), counts, topology)
            metrics |= {f"rep/factor/layer_{layer}": factor for layer, factor in global_batch.layer_factors.items()}
    if plan.flow:
        metrics |= _flow_metrics(taps, student, loss)
        total += loss.flow.weight * metrics["flow/loss"]
    if plan.output:
        metrics |= output_metrics(_output_sums(taps, topology), global_batch.output.counts, with_metrics=with_metrics)
        total += loss.output.weight * metrics["output/loss"]
    return StepReport(total, float(grad_norm), learning_rate, metrics, squares)


def stage_loss(
    student: Student,
    loss: LossConfig,
    batch: DeviceBatch,
    targets: MicroBatchTargets,
    output: OutputLoss | None = None,
    layer_factors: Mapping[int, float] | None = None,
) -> StudentTap:
    """Build the tap that computes the losses of one micro-batch on this rank. Arguments as in `student_step`.

    `layer_factors`: those of the global batch.
    """
    config, weights = loss.representation, batch.representation.weights
    layers = StageLoss(
        batch.representation.selected,
        config.weight * layer_weights(weights, max(len(student.plan.pairs), 1)),
        targets,
        normalize=config.normalize,
        metric_weights=weights,
        layer_factors=layer_factors,
        measure_squares=config.layer_weights == "inverse_square",
        maps=student.maps,
        release=targets.release,
    )
    flow = _flow_tap(student, loss, batch, targets) if student.plan.flow else None
    if output is None or FINAL_STATES not in targets:
        return StudentTap(layers, None, flow)
    return StudentTap(layers, OutputTap(output, batch.output, partial(targets.take, FINAL_STATES)), flow)


def _flow_tap(student: Student, loss: LossConfig, batch: DeviceBatch, targets: MicroBatchTargets) -> FlowTap:
    plan, topology = student.plan, student.topology
    roles = plan.flow_roles(topology.stages)
    terms = FlowTerms(loss.flow, roles, len(plan.flow), len(plan.flow_pairs))
    assert batch.flow is not None  # the global batch has the same loss
    return FlowTap(terms, batch.flow, lambda layer: targets.take(FlowKey(layer)), topology)


def accumulate_gradients(student: Student, micro_batches: Sequence[DeviceBatch], taps: Iterable[Tap]) -> None:
    """Zero the gradients, run forward and backward of all micro-batches, and reduce the gradients over the ranks.

    Communicates over: all groups.
    """
    for chunk in student.ddp:
        chunk.train()
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()
    plan = student.plan
    settings = PassSettings(
        plan.student_last_layer, plan.student_normed_layer, forward_only=False, taps_input=plan.flow_straddles
    )
    run_schedule(student.ddp, student.topology, micro_batches, taps, settings)


def _layer_sums(taps: Sequence[StudentTap], topology: Topology, plan: LayerPlan) -> dict[int, list[float]]:
    """Sums [4] of every compared student layer over micro-batches, ranks that hold other tokens, and pipeline ranks."""
    layers = plan.student_layers
    local = torch.zeros(len(layers), 4, dtype=torch.float64, device=topology.device)
    for tap in taps:
        for layer, sums in tap.layers.sums.items():
            local[layers.index(layer)] += sums
    values = _sum_over_all(local, [*topology.token_groups, topology.groups.pp], topology)
    return {layer: values[4 * i : 4 * i + 4] for i, layer in enumerate(layers)}


def _weighted_mean(metrics: Mapping[str, float], layer_factors: Mapping[int, float]) -> float:
    """Return the mean over layers of factor times error, from the metrics of the layers."""
    if not layer_factors:
        return metrics["rep/mse"]
    errors = (factor * metrics[f"rep/mse/layer_{layer}"] for layer, factor in layer_factors.items())
    return sum(errors) / len(layer_factors)


def _layer_squares(taps: Sequence[StudentTap], plan: LayerPlan) -> dict[int, float]:
    """Return the sums of `StageLoss.squares` over micro-batches on this rank; 0 for layers of other stages."""
    sums = dict.fromkeys(plan.student_layers, 0.0)
    for tap in taps:
        for layer, square in tap.layers.squares.items():
            sums[layer] += square.item()
    return sums


def _flow_metrics(taps: Sequence[StudentTap], student: Student, loss: LossConfig) -> dict[str, float]:
    """Return the three parts of the hidden-flow loss, as means over layers and sequences, and their weighted sum."""
    topology, config, plan = student.topology, loss.flow, student.plan
    local = torch.zeros(3, dtype=torch.float64, device=topology.device)
    for tap in taps:
        # Tensor- and context-parallel ranks have all sums alike.
        if tap.flow is not None and topology.context_rank == 0:
            local += tap.flow.sums
    sums = _sum_over_all(local, [topology.groups.dp_cp, topology.groups.pp], topology)
    direction, geometry = (total / len(plan.flow) for total in sums[:2])
    adjacent = sums[2] / max(len(plan.flow_pairs), 1)
    mean = config.direction * direction + config.geometry * geometry + config.adjacent * adjacent
    return {
        "flow/loss": mean,
        "flow/direction": direction,
        "flow/geometry": geometry,
        "flow/adjacent": adjacent,
    }


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
