"""A transformer layer that passes its output to the tap of the micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.models.tap_params import TappedSeqParams


class TappedTransformerLayer(TransformerLayer):
    """Megatron-Core's layer, whose output goes through the tap that `packed_seq_params` carries.

    Without a tap the layer is Megatron-Core's own. A forward hook could not replace the tap: inside a recomputed region
    a hook sees tensors without gradient, so a loss on them would train nothing.
    """

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        params = kwargs.get("packed_seq_params")
        if not isinstance(params, TappedSeqParams):
            return super().forward(hidden_states, *args, **kwargs)
        if params.last_layer is not None and self.layer_number > params.last_layer:
            return hidden_states, kwargs.get("context")
        output, context = super().forward(hidden_states, *args, **kwargs | {"packed_seq_params": params.for_layer()})
        if params.tap is not None and self.layer_number != params.normed_layer:
            output = params.tap(self.layer_number, output)
        return output, context


def tapped_layer_spec(
    spec: ModuleSpec | TransformerBlockSubmodules,
) -> ModuleSpec | TransformerBlockSubmodules:
    """Return a copy of a layer spec, or of the layer specs of a block, whose layers have taps.

    Only the class of the layer changes; norms, attention and MLP stay those of `spec`.

    Raises:
        ValueError: a layer of `spec` is not Megatron-Core's TransformerLayer.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        return dataclasses.replace(spec, layer_specs=[tapped_layer_spec(layer) for layer in spec.layer_specs])
    if spec.module is not TransformerLayer:
        raise ValueError(f"tapped_layer_spec: the layer must be Megatron-Core's TransformerLayer, not {spec.module}")
    return dataclasses.replace(spec, module=TappedTransformerLayer)
