"""Core attention over torch's scaled_dot_product_attention: packed sequences, grouped queries, no S x S tensor."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_oprd.models import micro_batch


class PackedAttention(torch.nn.Module):
    """Causal self-attention inside each sequence of the micro-batch in flight. No communication: heads are already
    divided over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.scale = kwargs.get("softmax_scale") or config.kv_channels**-0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query [tokens, 1, heads, d], key and value [tokens, 1, groups, d] -> [tokens, 1, heads * d]."""
        tokens, _, heads, width = query.shape
        # One call a sequence: the same kernel and shapes as an unpacked model, hence the same numbers.
        query, key, value = (x.squeeze(1).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        bounds = micro_batch.of(kwargs).bounds
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                is_causal=True,
                scale=self.scale,
                enable_gqa=key.shape[1] != heads,
            )
            for start, end in itertools.pairwise(bounds)
        ]
        return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1).reshape(tokens, 1, heads * width)
