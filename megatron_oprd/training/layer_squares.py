"""The mean squares of the teacher's layers, from which `layer_weights: inverse_square` weighs the layers' losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from megatron_oprd.losses.reduction import square_sum
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.state import LayerSquares
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import DeviceBatch, GlobalCounts


def weigh_layers(
    teachers: Sequence[Teacher],
    global_batch: GlobalBatch,
    micro_batches: Sequence[DeviceBatch],
    topology: Topology,
    known: LayerSquares,
) -> GlobalBatch:
    """Return the global batch with the factor of each compared layer's loss (`loss.representation.layer_weights`).

    `known` has the mean squares of earlier steps. Without earlier steps the teachers run once more to measure those of
    this step. The other arguments are as in `teacher_pass`. Then collective over the world, otherwise no communication.
    A step without a selected token has no mean squares and needs no factors.
    """
    config, layers = global_batch.loss.representation, teachers[0].plan.student_layers
    if config.layer_weights == "equal" or not global_batch.representation.counts.tokens:
        return global_batch
    if config.layer_weights == "inverse_square":
        squares = known.means or measure_squares(teachers, global_batch, micro_batches, topology)
        factors = {layer: 1.0 / square for layer, square in squares.items()}
    else:
        factors = dict(zip(layers, config.layer_weights, strict=True))
    return dataclasses.replace(global_batch, layer_factors=factors)


def measure_squares(
    teachers: Sequence[Teacher], global_batch: GlobalBatch, micro_batches: Sequence[DeviceBatch], topology: Topology
) -> dict[int, float]:
    """Return the mean square of the teacher's states at the selected tokens of a step, by student layer.

    Runs the teachers as `teacher_pass` does, up to their highest compared layer. Collective over the world.
    """
    of_layers = dataclasses.replace(global_batch, loss=global_batch.loss.only_layers)
    targets, _ = teacher_pass(teachers, of_layers, micro_batches, topology)
    layers = teachers[0].plan.student_layers
    local = torch.zeros(len(layers), dtype=torch.float64, device=topology.device)
    for number in range(len(micro_batches)):
        of_batch = targets.of(number)
        for layer in of_batch:
            states = of_batch.take(layer)
            local[layers.index(layer)] += square_sum(states.float().norm(dim=-1), states.shape[-1])
    return mean_squares(dict(zip(layers, local.tolist(), strict=True)), global_batch.representation.counts, topology)


def mean_squares(local: Mapping[int, float], counts: GlobalCounts, topology: Topology) -> dict[int, float]:
    """Return the global mean square of each layer from the sums of `square_sum` on this rank.

    `local` has all layers, with 0 for those of other pipeline stages. `counts.tokens` is above 0.
    Communicates over: the groups whose ranks have other tokens, and the pipeline-parallel group.
    """
    sums = list(local.values())
    for group in (*topology.token_groups, topology.groups.pp):
        sums = sum_over(sums, group, topology.device)
    return {layer: total / counts.tokens for layer, total in zip(local, sums, strict=True)}
