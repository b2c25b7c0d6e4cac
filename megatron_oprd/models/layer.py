"""A transformer layer that passes its output to the tap of the micro-batch."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.models.recompute import run_mlp, run_norm
from megatron_oprd.models.tap_params import TappedSeqParams


class TappedTransformerLayer(TransformerLayer):
    """Megatron-Core's layer, whose output goes through the tap that `packed_seq_params` carries.

    Without a tap the layer is Megatron-Core's own. A forward hook could not replace the tap: inside a recomputed region
    a hook sees tensors without gradient, so a loss on them would train nothing.
    """

    recomputed_parts: frozenset[str] = frozenset()  # of this block, in backward (`recompute.py`)

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

    def _forward_attention(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "layernorm" not in self.recomputed_parts or not torch.is_grad_enabled():
            return super()._forward_attention(hidden_states, *args, **kwargs)
        normed = run_norm(self.input_layernorm, hidden_states, self.recomputed_parts)
        mask, params = kwargs.get("attention_mask"), kwargs["packed_seq_params"]
        with normed.storing_nothing():
            output = self.self_attention(normed.tensor, attention_mask=mask, packed_seq_params=params)
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        return add(output, hidden_states, self.hidden_dropout), kwargs.get("context")

    def _forward_mlp(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.recomputed_parts or not torch.is_grad_enabled():
            return super()._forward_mlp(hidden_states, *args, **kwargs)
        normed = run_norm(self.pre_mlp_layernorm, hidden_states, self.recomputed_parts)
        return self._forward_post_mlp(run_mlp(self.mlp, normed, self.recomputed_parts), hidden_states)


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
