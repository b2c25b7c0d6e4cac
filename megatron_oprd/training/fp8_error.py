"""Compare the hidden states of a teacher in FP8 with its hidden states in bf16."""

from __future__ import annotations

import dataclasses
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
    """The FP8 error of the teacher layer that one student layer is compared with, over all selected tokens."""

    teacher_layer: int
    relative: float  # ||h_fp8 - h_bf16|| / ||h_bf16||, Frobenius norms
    floor: float  # this layer's part of the loss of a student whose hidden states equal the teacher's in bf16


def measure_error(
    exact: Sequence[Teacher],
    in_fp8: Sequence[Teacher],
    global_batch: GlobalBatch,
    topology: Topology,
) -> dict[int, LayerError]:
    """Return the error of each compared layer by student layer, the same on every rank.

    Memory: the selected rows of all compared layers, twice. With `teachers_in_memory: one`, only one precision of the
    teachers is in memory at a time.

    Args:
        exact: The teachers without FP8.
        in_fp8: The same teachers with FP8, in the same layouts.
        global_batch: The rollouts.
        topology: The student's layout.

    Communicates over: all groups.
    """
    plan, normalize = exact[0].plan, global_batch.loss.representation.normalize
    micro_batches = global_batch.micro_batches(topology)
    exact_states, fp8_states = (
        _hidden_states(teachers, global_batch, micro_batches, topology) for teachers in (exact, in_fp8)
    )
    sums = torch.zeros(len(plan.student_layers), 3, dtype=torch.float64, device=topology.device)
    for batch, exact_by_layer, fp8_by_layer in zip(micro_batches, exact_states, fp8_states, strict=True):
        weights = layer_weights(batch.representation.weights, num_layers=len(plan.pairs))
        for layer in exact_by_layer.keys() & set(plan.student_layers):
            target, state = fp8_by_layer[layer], exact_by_layer[layer]
            statistics = token_statistics(state, target, normalize)
            difference = (target.double() - state.double()).pow(2).sum()
            floor = layer_sums(statistics, weights)[0]
            sums[plan.student_layers.index(layer)] += torch.stack((difference, state.double().pow(2).sum(), floor))
    values: list[float] = sums.flatten().tolist()
    for group in (*topology.token_groups, topology.groups.pp):
        values = sum_over(values, group, topology.device)
    return _errors(plan, values)


def _hidden_states(
    teachers: Sequence[Teacher], global_batch: GlobalBatch, micro_batches: Sequence[DeviceBatch], topology: Topology
) -> list[dict[int, torch.Tensor]]:
    """Return the teachers' hidden states by student layer, one dict for each micro-batch."""
    teachers = [dataclasses.replace(teacher, base=None) for teacher in teachers]
    targets, _ = teacher_pass(teachers, global_batch, micro_batches, topology)
    states = []
    for number in range(len(micro_batches)):
        micro_batch_targets = targets.of(number)  # a streamed teacher runs here
        states.append({layer: micro_batch_targets.take(layer) for layer in micro_batch_targets})
    return states


def _errors(plan: LayerPlan, values: Sequence[float]) -> dict[int, LayerError]:
    teacher_layers = {pair.student: pair.teacher for pair in plan.pairs}
    errors = {}
    for index, layer in enumerate(plan.student_layers):
        difference, total, floor = values[3 * index : 3 * index + 3]
        errors[layer] = LayerError(teacher_layers[layer], (difference / total) ** 0.5 if total else 0.0, floor)
    return errors
