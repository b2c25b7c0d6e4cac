"""What listens to the layers: the teacher's states are kept, the student's get their loss where they are born."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_oprd.losses.reduction import layer_sums, layer_weights
from megatron_oprd.losses.representation import token_statistics, weighted_gradient
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.models.projection import StudentMap
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.types import FINAL_STATES, PackedBatch, Selection, StateKey


class CaptureTap:
    """Keeps the states of some layers at some rows, detached: {layer: [rows, hidden]}.

    `selected`: {layer: [rows] int64}. `maps`: for some layers, what is kept in place of their states.
    """

    def __init__(
        self,
        selected: Mapping[StateKey, torch.Tensor],
        maps: Mapping[int, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> None:
        self.selected = selected
        self.maps = maps or {}
        self.states: dict[StateKey, torch.Tensor] = {}

    def __call__(self, layer: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer in self.selected:
            states = selected_rows(hidden_states.detach(), self.selected[layer])
            self.states[layer] = self.maps[layer](states) if layer in self.maps else states
        return hidden_states


class StageLoss:
    """The terms of the loss whose states this rank owns, on one micro-batch: OPRD-Vanilla (OPRD eq. (6)) of its student
    layers, or OPRD-Bridge (eq. (14)) with their `maps`; with `output`, on the last stage, the output-space objective.

    The loss never travels: its gradient is added to the layer's during backward, and the sums behind the metrics are
    kept in `sums` ({student layer: [4] float64}, the same after a recomputation) and `output_sums`. The last to read a
    target takes it away: of a layer that is backward, of the final states the forward pass, which no recomputation
    repeats and which makes their gradient at once. `scale`: the weight of the representation term. Communicates over
    the tensor-parallel group for the final states, else not at all.
    """

    def __init__(
        self,
        batch: PackedBatch,
        targets: MicroBatchTargets,
        num_layers: int,
        *,
        normalize: str,
        scale: float,
        maps: Mapping[int, StudentMap] | None = None,
        output: OutputLoss | None = None,
    ) -> None:
        self.targets = targets
        self.batch = batch
        self.normalize = normalize
        self.maps = maps or {}
        self.output = output
        self.gradient_weights = scale * layer_weights(batch.representation.weights, max(num_layers, 1))
        self.sums: dict[int, torch.Tensor] = {}
        self.output_sums: torch.Tensor | None = None

    def __call__(self, layer: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        # The first pass of a recomputed region runs without gradient; the loss belongs to the second.
        if layer not in self.targets or not torch.is_grad_enabled():
            return hidden_states
        if layer == FINAL_STATES:
            return self._output(hidden_states)
        return _WithStageLoss.apply(hidden_states, self, layer)

    def _output(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert self.output is not None  # only a student with an output-space objective has targets for it
        selection = self.batch.output
        student = selected_rows(hidden_states.detach(), selection.selected)
        gradient, self.output_sums = self.output(student, self.targets.take(FINAL_STATES), selection)
        return _WithGradient.apply(hidden_states, gradient, selection)


class _WithStageLoss(torch.autograd.Function):
    """Passes a layer's output through and adds its loss's gradient on the way back. What backward needs are the layer's
    output, which the next layer keeps anyway, and the targets."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, tap: StageLoss, layer: int) -> torch.Tensor:
        selection = tap.batch.representation
        states = selected_rows(hidden_states, selection.selected)
        compared = tap.maps[layer](states) if layer in tap.maps else states
        statistics = token_statistics(compared, tap.targets.read(layer), tap.normalize)
        tap.sums[layer] = layer_sums(statistics, selection.weights)
        ctx.save_for_backward(hidden_states)
        ctx.tap, ctx.layer = tap, layer
        return _passed_through(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden_states,) = ctx.saved_tensors
        tap: StageLoss = ctx.tap
        selected, target = tap.batch.representation.selected, tap.targets.take(ctx.layer)
        states, layer_map = selected_rows(hidden_states, selected), tap.maps.get(ctx.layer)
        compared = states if layer_map is None else layer_map(states)
        own = weighted_gradient(compared, target, tap.normalize, tap.gradient_weights)
        if layer_map is not None:
            own = layer_map.pull_back(own, states)
        # Out of place: another branch of the graph may read the incoming gradient. No row is selected twice.
        return gradients[0].index_add(0, selected, own[:, None]), None, None


class _WithGradient(torch.autograd.Function):
    """Passes the final states through and adds a gradient that is known already on the way back."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, gradient: torch.Tensor, selection: Selection) -> torch.Tensor:
        ctx.gradient, ctx.selected = gradient, selection.selected
        return _passed_through(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradients[0].index_add(0, ctx.selected, ctx.gradient[:, None]), None, None


def _passed_through(hidden_states: torch.Tensor) -> torch.Tensor:
    """The same values in the same memory. Returned as it is, an autograd function's input would become a view, which
    pipeline schedules refuse to free."""
    output = torch.empty(0, dtype=hidden_states.dtype, device=hidden_states.device)
    output.data = hidden_states.data
    return output


def selected_rows(hidden_states: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Of a layer's output: [tokens, 1, hidden] -> [selected tokens, hidden], a copy."""
    return hidden_states.index_select(0, selected)[:, 0]
