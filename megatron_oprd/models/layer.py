"""The transformer layer that hands its output to the micro-batch's tap."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.models import micro_batch


class TappedTransformerLayer(TransformerLayer):
    """mcore's layer, with its output shown to the tap. No forward hook: hooks in recomputed regions see tensors
    without gradient and train nothing.

    The micro-batch's `normed_layer` is tapped after the final norm, in `model.HiddenStateModel`.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = micro_batch.of(kwargs)
        if batch.last_layer is not None and self.layer_number > batch.last_layer:
            return hidden_states, kwargs.get("context")
        output, cross_attention = super().forward(hidden_states, *args, **kwargs)
        if batch.tap is not None and self.layer_number != batch.normed_layer:
            output = batch.tap(self.layer_number, output)
        return output, cross_attention
