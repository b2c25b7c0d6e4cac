"""The tap of the hidden-flow loss (`losses/flow.py`) on one micro-batch of the student.

A layer's rows are copied in the first forward pass, and backward computes the gradient from them. Two neighbouring
layers on different pipeline stages need no message: the input of the later stage is the output of the earlier one, so
the later stage taps its input, and the gradient flows back through the pipeline. Ranks that share the tokens of a
sequence gather the rows, compute the same, and each adds the gradient of its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_oprd.config import FlowConfig
from megatron_oprd.losses.flow import (
    Cosines,
    Directions,
    cosine_error,
    cosine_gradients,
    direction_error,
    direction_gradient,
    directions,
)
from megatron_oprd.models.layer_plan import FlowRole
from megatron_oprd.models.tap_rows import add_rows, same_values, selected_rows
from megatron_oprd.parallel.sequence_rows import gather_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import DeviceSelection, StateKey


@dataclass(frozen=True)
class FlowTerms:
    """The layers of the hidden-flow loss on one rank, and the divisors of its means."""

    config: FlowConfig
    roles: Mapping[int, FlowRole]  # by student layer
    num_layers: int  # of all ranks
    num_neighbours: int  # pairs of neighbouring layers, of all ranks

    @property
    def factors(self) -> tuple[float, float, float]:
        """Return the factors of one layer's direction, geometry and adjacent error in the loss."""
        config, pairs = self.config, max(self.num_neighbours, 1)
        of_layer, of_pair = config.weight / self.num_layers, config.weight / pairs
        return config.direction * of_layer, config.geometry * of_layer, config.adjacent * of_pair


class FlowTap:
    """A tap with the hidden-flow loss of one micro-batch.

    `sums` is [3] float64: direction, geometry and adjacent errors, weighted over sequences and summed over layers.
    Communicates over: the tensor-parallel group under sequence parallelism, and the context-parallel group.

    Args:
        terms: the layers of this rank.
        selection: the positions on this rank, with their groups by sequence.
        take_target: a function that returns the teacher's states [N, d_T] for a student layer and forgets them.
        topology: the student's layout.
    """

    def __init__(
        self,
        terms: FlowTerms,
        selection: DeviceSelection,
        take_target: Callable[[int], torch.Tensor],
        topology: Topology,
    ) -> None:
        assert selection.groups is not None
        self.terms, self.selection, self.groups, self.topology = terms, selection, selection.groups, topology
        self.take_target = take_target
        self.sums = torch.zeros(3, dtype=torch.float64, device=topology.device)
        self._states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer: of student and teacher, gathered

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the values of `hidden_states`, with the loss attached if this rank compares layer `key`."""
        if not isinstance(key, int) or key not in self.terms.roles:
            return hidden_states
        if key not in self._states:  # a region that is recomputed runs without gradient first
            states = selected_rows(hidden_states.detach(), self.selection.selected)
            self._states[key] = self._gather(states), self._gather(self.take_target(key))
            self._measure(key)
        return _WithFlow.apply(hidden_states, self, key) if torch.is_grad_enabled() else hidden_states

    def gradient(self, layer: int) -> torch.Tensor:
        """Return the gradient of this rank's rows of a layer [N, hidden], and forget the states of the layer above.

        Backward reaches the layers of a stage from the highest to the lowest.
        """
        role, (direction, geometry, adjacent) = self.terms.roles[layer], self.terms.factors
        student, teacher = self._directions(layer)
        per_step, per_cosine = self._weights(student.units)
        total = torch.zeros_like(student.units)
        if role.own and direction:
            total += direction * per_step * direction_gradient(student, teacher)
        if role.own and geometry:
            total += geometry * per_cosine * sum(cosine_gradients(*_cosines((student, teacher), (student, teacher))))
        if role.below:
            _, second = cosine_gradients(*_cosines(self._directions(layer - 1), (student, teacher)))
            total += adjacent * per_cosine * second
        if role.above:
            first, _ = cosine_gradients(*_cosines((student, teacher), self._directions(layer + 1)))
            total += adjacent * per_cosine * first
            del self._states[layer + 1]
        dtype = self._states[layer][0].dtype
        if not role.below:
            del self._states[layer]
        return student.pull_back(total).flatten(0, 1)[self.groups.places].to(dtype)

    def _measure(self, layer: int) -> None:
        """Add the errors of a layer to `sums`, and those of the pair with the layer below."""
        role, own = self.terms.roles[layer], self._directions(layer)
        per_step, per_cosine = (weights.flatten() for weights in self._weights(own[0].units))
        if role.own:
            self.sums[0] += (per_step * direction_error(*own)).sum() if self.terms.config.direction else 0.0
            self.sums[1] += (per_cosine * cosine_error(*_cosines(own, own))).sum()
        if role.below:
            self.sums[2] += (per_cosine * cosine_error(*_cosines(self._directions(layer - 1), own))).sum()

    def _directions(self, layer: int) -> tuple[Directions, Directions]:
        """Return the directions of student and teacher at a layer."""
        of_student, of_teacher = self._states[layer]
        return directions(of_student[self.groups.grid]), directions(of_teacher[self.groups.grid])

    def _weights(self, units: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weight of each sequence over m - 1 and over (m - 1)^2, both [sequences, 1, 1]."""
        weights = self.groups.weights.to(units.dtype)[:, None, None]
        steps = (self.groups.lengths - 1).to(units.dtype)[:, None, None]
        return weights / steps, weights / steps**2

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks that share the tokens of the sequences, in the order of `grid`."""
        topology, counts = self.topology, self.groups.rows_per_rank
        size = len(counts) // topology.context_size  # of the sequence-parallel group
        if size > 1:
            first = topology.context_rank * size
            rows = gather_rows(rows, counts[first : first + size], topology.groups.tp)
        if topology.context_size > 1:
            rows = gather_rows(rows, self.groups.rows_per_context_rank(topology.context_size), topology.groups.cp)
        return rows


def _cosines(first: tuple[Directions, Directions], second: tuple[Directions, Directions]) -> tuple[Cosines, Cosines]:
    """Return the cosines of student and teacher between two layers, from (student, teacher) at each of them."""
    student, teacher = (Cosines(one.units, other.units) for one, other in zip(first, second, strict=True))
    return student, teacher


class _WithFlow(torch.autograd.Function):
    """The identity, whose backward adds the gradient of the hidden-flow loss at one layer."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, tap: FlowTap, layer: int) -> torch.Tensor:
        ctx.tap, ctx.layer = tap, layer
        return same_values(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return add_rows(gradients[0], ctx.tap.selection.selected, ctx.tap.gradient(ctx.layer)), None, None
