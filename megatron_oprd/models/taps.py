"""Taps: the functions that receive a layer's hidden states during the forward pass of one micro-batch.

CaptureTap copies the teacher's states. StageLoss compares the student's states with them on the pipeline stage that
computes the states, so that no hidden states travel between stages for the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_oprd.losses.reduction import layer_sums, square_sum
from megatron_oprd.losses.representation import token_statistics, weighted_gradient
from megatron_oprd.models.flow_tap import FlowTap
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.models.state_map import StateMap
from megatron_oprd.models.tap_rows import add_rows, same_values, selected_rows
from megatron_oprd.types import FINAL_STATES, DeviceSelection, FlowKey, StateKey


class CaptureTap:
    """A tap that copies the states of some layers at selected tokens into `states`, {key: [N, hidden]}, detached.

    Args:
        selected: {key: [N] int64}, the rows to copy of each layer's states, counted in hidden_states.flatten(0, 1):
            row s * batch_size + b is token s of sequence b. FlowKey(l) stands for other rows of layer l.
        maps: for some layers, a function of the copied states whose result is stored instead of the states.
    """

    def __init__(
        self,
        selected: Mapping[StateKey, torch.Tensor],
        maps: Mapping[StateKey, Callable[[torch.Tensor], torch.Tensor]] | None = None,
    ) -> None:
        self.selected = selected
        self.maps = maps or {}
        self.states: dict[StateKey, torch.Tensor] = {}

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return `hidden_states` unchanged."""
        for one in (key, FlowKey(key)) if isinstance(key, int) else (key,):
            if one in self.selected:
                states = selected_rows(hidden_states.detach(), self.selected[one])
                self.states[one] = self.maps[one](states) if one in self.maps else states
        return hidden_states


class StageLoss:
    """A tap with the loss between a student's and a teacher's hidden states (OPRD eq. (6)) on one micro-batch:

        loss = sum over layers l and selected tokens t of weights[t] * e[l, t],
        e[l, t] = ||f(student[l, t]) - f(teacher[l, t])||^2 / hidden.

    The loss has no scalar in the autograd graph. The tap adds its gradient to that of the layer's output while backward
    passes the layer, so the result does not depend on which pipeline stage computes the layer. A factor that the
    training loop applies to its own loss (1 / micro-batches, a loss scale) does not apply here: put it into `weights`.

    `sums[l]` is [4] float64, on this rank: the weighted error of layer l, then the plain sums of cosine, student norm
    and teacher norm. Recomputation does not change it. No communication.

    Args:
        selected: [N] int64, rows of hidden_states.flatten(0, 1) on this rank: row s * batch_size + b is token s of
            sequence b.
        weights: [N], the factor of each selected token in the loss.
        targets: {layer: [N, hidden]}, the teacher's states for the student layers (numbered from 1) that this rank may
            compute; other layers have no loss.
        normalize: f, "none" (the identity) or "l2" (each state is divided by its norm).
        metric_weights: [N], weights of the errors in `sums` where they differ from `weights`.
        layer_factors: {layer: factor}, by which the weights of a layer are multiplied; 1 for other layers.
        measure_squares: fill `squares`, {layer: sum over tokens of the mean square of the teacher's state}.
        maps: {layer: map}, maps of the student's states before they are compared, such as P_S of OPRD eq. (14).
        release: a function that is called with a layer once its target is no longer needed.
    """

    def __init__(
        self,
        selected: torch.Tensor,
        weights: torch.Tensor,
        targets: Mapping[StateKey, torch.Tensor],
        *,
        normalize: str = "none",
        metric_weights: torch.Tensor | None = None,
        layer_factors: Mapping[int, float] | None = None,
        measure_squares: bool = False,
        maps: Mapping[int, StateMap] | None = None,
        release: Callable[[StateKey], object] | None = None,
    ) -> None:
        self.selected = selected
        self.weights = weights
        self.targets = targets
        self.normalize = normalize
        self.metric_weights = weights if metric_weights is None else metric_weights
        self.layer_factors = layer_factors or {}
        self.measure_squares = measure_squares
        self.squares: dict[StateKey, torch.Tensor] = {}
        self.maps = maps or {}
        self.release = release
        self.sums: dict[StateKey, torch.Tensor] = {}

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the values of `hidden_states`, with the loss of layer `key` attached if it has a target."""
        # The first pass of a recomputed region runs without gradient: the second pass attaches the loss.
        if key not in self.targets or not torch.is_grad_enabled():
            return hidden_states
        return _WithStageLoss.apply(hidden_states, self, key)


class OutputTap:
    """A tap with an output-space objective on the final states of one micro-batch, on the last pipeline stage.

    The forward pass computes value and gradient at once, as no recomputation repeats the final states. Backward adds
    the gradient. `sums` are those of OutputLoss. Communicates over the tensor-parallel group.

    Args:
        objective: the objective and the LM heads.
        selection: the tokens of this rank.
        take_target: a function that returns the teacher's final states [N, d_T] and forgets them.
    """

    def __init__(
        self, objective: OutputLoss, selection: DeviceSelection, take_target: Callable[[], torch.Tensor]
    ) -> None:
        self.objective = objective
        self.selection = selection
        self.take_target = take_target
        self.sums: torch.Tensor | None = None

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the values of `hidden_states`, with the objective attached to the final states."""
        if key != FINAL_STATES or not torch.is_grad_enabled():
            return hidden_states
        selected = self.selection.selected
        student = selected_rows(hidden_states.detach(), selected)
        gradient, self.sums = self.objective(student, self.take_target(), self.selection)
        return _WithGradient.apply(hidden_states, gradient, selected)


@dataclass(frozen=True)
class StudentTap:
    """The tap of one micro-batch of the student: the losses on its layers, and the objective on its final states."""

    layers: StageLoss
    output: OutputTap | None  # None: no output-space objective, or another stage computes the final states
    flow: FlowTap | None = None  # None: no loss on hidden flow

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        if key != FINAL_STATES:
            hidden_states = self.layers(key, hidden_states)
            return hidden_states if self.flow is None else self.flow(key, hidden_states)
        return hidden_states if self.output is None else self.output(key, hidden_states)


class _WithStageLoss(torch.autograd.Function):
    """The identity, whose backward adds the gradient of the loss of one layer.

    Backward needs the layer's output, which the next layer keeps anyway, and the target. It computes the gradient anew.
    """

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, loss: StageLoss, layer: int) -> torch.Tensor:
        states = selected_rows(hidden_states, loss.selected)
        compared = loss.maps[layer](states) if layer in loss.maps else states
        statistics = token_statistics(compared, loss.targets[layer], loss.normalize)
        loss.sums[layer] = layer_sums(statistics, loss.metric_weights)
        if loss.measure_squares:
            loss.squares[layer] = square_sum(statistics.teacher_norm, compared.shape[-1])
        ctx.save_for_backward(hidden_states)
        ctx.loss, ctx.layer = loss, layer
        return same_values(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden_states,) = ctx.saved_tensors
        loss: StageLoss = ctx.loss
        target, states = loss.targets[ctx.layer], selected_rows(hidden_states, loss.selected)
        if loss.release is not None:
            loss.release(ctx.layer)
        layer_map = loss.maps.get(ctx.layer)
        compared = states if layer_map is None else layer_map(states)
        factor = loss.layer_factors.get(ctx.layer)
        weights = loss.weights if factor is None else factor * loss.weights
        own = weighted_gradient(compared, target, loss.normalize, weights)
        if layer_map is not None:
            own = layer_map.pull_back(own, states)
        return add_rows(gradients[0], loss.selected, own), None, None


class _WithGradient(torch.autograd.Function):
    """The identity, whose backward adds a gradient that is already computed."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, gradient: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        ctx.gradient, ctx.selected = gradient, selected
        return same_values(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return add_rows(gradients[0], ctx.selected, ctx.gradient), None, None
