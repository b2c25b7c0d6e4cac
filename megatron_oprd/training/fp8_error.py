"""How far the states of a teacher in FP8 are from its own in bf16, and the least loss that this leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.losses.reduction import layer_sums, layer_weights
from megatron_oprd.losses.representation import token_statistics
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import DeviceBatch


@dataclass(frozen=True)
class LayerError:
    """Of the teacher layer that a student layer is compared with, over all selected tokens."""

    teacher_layer: int
    relative: float  # ||h_fp8 - h|| / ||h||, the Frobenius norms
    floor: float  # what the layer adds to the loss of a student whose states are those of the teacher in bf16


def measure_error(
    exact: Sequence[Teacher],
    in_fp8: Sequence[Teacher],
    global_batch: GlobalBatch,
    topology: Topology,
) -> dict[int, LayerError]:
    """The error of each compared layer, by student layer, the same on every rank. `exact` and `in_fp8`: the same
    teachers at two precisions, in the same layouts.

    Memory: the selected rows of all compared layers, twice, and the teachers one precision after the other where their
    `load` makes them anew. Communicates over all groups.
    """
    plan, normalize = exact[0].plan, global_batch.loss.representation.normalize
    micro_batches = global_batch.micro_batches(topology)
    wanted, found = (_states(teachers, global_batch, micro_batches, topology) for teachers in (exact, in_fp8))
    sums = torch.zeros(len(plan.student_layers), 3, dtype=torch.float64, device=topology.device)
    for batch, of_exact, of_fp8 in zip(micro_batches, wanted, found, strict=True):
        weights = layer_weights(batch.representation.weights, num_layers=len(plan.pairs))
        for layer in of_exact.keys() & set(plan.student_layers):
            target, state = of_fp8[layer], of_exact[layer]
            statistics = token_statistics(state, target, normalize)
            difference = (target.double() - state.double()).pow(2).sum()
            floor = layer_sums(statistics, weights)[0]
            sums[plan.student_layers.index(layer)] += torch.stack((difference, state.double().pow(2).sum(), floor))
    values: list[float] = sums.flatten().tolist()
    for group in (*topology.token_groups, topology.groups.pp):
        values = sum_over(values, group, topology.device)
    return _errors(plan, values)


def _states(
    teachers: Sequence[Teacher], global_batch: GlobalBatch, micro_batches: Sequence[DeviceBatch], topology: Topology
) -> list[dict[int, torch.Tensor]]:
    """By micro-batch and student layer."""
    targets, _ = teacher_pass(teachers, global_batch, micro_batches, topology)
    held = []
    for number in range(len(micro_batches)):
        targets.of(number)  # made now where the teacher is streamed
        held.append({layer: targets.take(number, layer) for layer in targets.layers})
    return held


def _errors(plan: LayerPlan, values: Sequence[float]) -> dict[int, LayerError]:
    of_student = {pair.student: pair.teacher for pair in plan.pairs}
    errors = {}
    for place, layer in enumerate(plan.student_layers):
        difference, whole, floor = values[3 * place : 3 * place + 3]
        errors[layer] = LayerError(of_student[layer], (difference / whole) ** 0.5 if whole else 0.0, floor)
    return errors
