"""What listens to the layers: the teacher's states are kept, the student's get their loss where they are born."""

from __future__ import annotations

from typing import Any

import torch

from megatron_oprd.losses.reduction import layer_sums, layer_weights
from megatron_oprd.losses.representation import token_statistics, weighted_gradient
from megatron_oprd.models.targets import MicroBatchTargets
from megatron_oprd.types import PackedBatch


class CaptureTap:
    """Keeps the states of some layers at the selected tokens, detached: {layer: [selected tokens, hidden]}."""

    def __init__(self, layers: frozenset[int], selected: torch.Tensor) -> None:
        self.layers = layers
        self.selected = selected
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        if layer in self.layers:
            self.states[layer] = _rows(hidden_states.detach(), self.selected)
        return hidden_states


class StageLoss:
    """OPRD-Vanilla (OPRD eq. (6)) of the student layers that this rank owns, on one micro-batch.

    The loss never travels: `scale * dL/dh` is added to the layer's gradient during backward, and the sums behind the
    metrics are kept in `sums` ({student layer: [4] float64}), the same after a recomputation. Backward is the last to
    read a layer's target and takes it away. No communication.
    """

    def __init__(
        self, batch: PackedBatch, targets: MicroBatchTargets, num_layers: int, *, normalize: str, scale: float
    ) -> None:
        self.targets = targets
        self.selected = batch.selected
        self.normalize = normalize
        self.token_weights = batch.weights
        self.gradient_weights = scale * layer_weights(batch.weights, num_layers)
        self.sums: dict[int, torch.Tensor] = {}

    def __call__(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        # The first pass of a recomputed region runs without gradient; the loss belongs to the second.
        if layer not in self.targets or not torch.is_grad_enabled():
            return hidden_states
        return _WithStageLoss.apply(hidden_states, self, layer)


class _WithStageLoss(torch.autograd.Function):
    """Passes a layer's output through and adds its loss's gradient on the way back. What backward needs are the layer's
    output, which the next layer keeps anyway, and the targets."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, tap: StageLoss, layer: int) -> torch.Tensor:
        statistics = token_statistics(_rows(hidden_states, tap.selected), tap.targets.read(layer), tap.normalize)
        tap.sums[layer] = layer_sums(statistics, tap.token_weights)
        ctx.save_for_backward(hidden_states)
        ctx.tap, ctx.layer = tap, layer
        # Returned as it is, the input would become a view, which pipeline schedules refuse to free.
        output = torch.empty(0, dtype=hidden_states.dtype, device=hidden_states.device)
        output.data = hidden_states.data
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden_states,) = ctx.saved_tensors
        tap: StageLoss = ctx.tap
        target = tap.targets.take(ctx.layer)
        own = weighted_gradient(_rows(hidden_states, tap.selected), target, tap.normalize, tap.gradient_weights)
        # Out of place: another branch of the graph may read the incoming gradient. No row is selected twice.
        return gradients[0].index_add(0, tap.selected, own[:, None]), None, None


def _rows(hidden_states: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """[tokens, 1, hidden] -> [selected tokens, hidden], a copy."""
    return hidden_states.index_select(0, selected)[:, 0]
