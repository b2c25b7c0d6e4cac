"""Core attention with torch's scaled_dot_product_attention: packed sequences, grouped queries, no S x S tensor."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention import bias as attention_bias

from megatron_oprd.models import micro_batch
from megatron_oprd.models.flash import (
    cudnn_attention,
    cudnn_attention_works,
    divide_by_kernel,
    flash_attention,
    flash_attention_works,
)
from megatron_oprd.models.micro_batch import ContextPart
from megatron_oprd.models.rotary import rotate


class GatedSelfAttention(SelfAttention):
    """Megatron-Core's self-attention, whose output gate rounds as that of transformers and is not compiled."""

    def _apply_output_gate(self, output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return output * torch.sigmoid(gate.reshape(output.shape))


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, scale: float, window: int
) -> torch.Tensor:
    """Return the causal attention of one sequence, [1, heads, tokens, d]. No communication.

    With a window, blocks of queries attend to the keys that they can see, so that time and memory grow linearly.

    Args:
        query: [1, heads, tokens, d].
        key, value: [1, groups, tokens, d].
        window: the most tokens to which a token attends, itself included; 0: all tokens before it.
    """
    tokens, gqa = query.shape[2], key.shape[1] != query.shape[1]
    first = min(window, tokens) if window else tokens
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=gqa)
    pieces = [attend(query[:, :, :first], key[:, :, :first], value[:, :, :first], is_causal=True)]
    for start in range(first, tokens, max(window, 1)):
        end, first_key = min(start + window, tokens), start - window + 1
        # Query i of the block attends to the keys i to i + window - 1 of the block.
        mask = torch.ones(end - start, end - first_key, dtype=torch.bool, device=query.device).triu_().tril_(window - 1)
        keys, values = key[:, :, first_key:end], value[:, :, first_key:end]
        pieces.append(attend(query[:, :, start:end], keys, values, attn_mask=mask))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


class PackedAttention(torch.nn.Module):
    """Causal self-attention inside each sequence of a micro-batch. Generation has its own (`cached_attention.py`).

    Heads are already divided over the tensor-parallel group.

    Communicates over: the context-parallel group, if there is one. Keys and values are gathered; backward reduces
    their gradients.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.scale = kwargs.get("softmax_scale") or config.kv_channels**-0.5
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else 0  # tokens to which a token attends; 0: all before it

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return [tokens, 1, heads * d] from query [tokens, 1, heads, d], key and value [tokens, 1, groups, d]."""
        batch = micro_batch.of(kwargs)
        assert batch.rotary is not None  # the model sets it before its first layer
        query, key = (rotate(x.squeeze(1), *batch.rotary) for x in (query, key))
        value = value.squeeze(1)
        if batch.context is not None:
            assert not self.window  # launch/layouts.py refuses it
            return self._context_parts(query, key, value, batch.bounds, batch.context)
        if not self.window and flash_attention_works(query.device, query.dtype, query.shape[-1]):
            return self._packed_sequences(query, key, value, batch)
        return self._sequences(query, key, value, batch.bounds)

    def _packed_sequences(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: micro_batch.MicroBatch
    ) -> torch.Tensor:
        """Compute the same as `_sequences` by CUDA kernels for several sequences."""
        if batch.attention_calls is None:
            cudnn = cudnn_attention_works(query.device, query.shape[-1])
            batch.attention_calls = divide_by_kernel(batch.bounds, query.device, cudnn=cudnn)
        outputs = []
        for call in batch.attention_calls:
            inputs = (query[call.start : call.end], key[call.start : call.end], value[call.start : call.end])
            if call.bounds is None:
                outputs.append(cudnn_attention(*inputs, self.scale))
            else:
                outputs.append(flash_attention(inputs, (call.bounds,) * 2, (call.longest,) * 2, self.scale))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.reshape(len(query), 1, -1)

    def _sequences(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Sequence[int]
    ) -> torch.Tensor:
        """Compute attention inside each sequence: [tokens, heads or groups, d] -> [tokens of bounds, 1, heads * d]."""
        heads, width = query.shape[1:]
        # One call for each sequence: kernel and shapes are those of an unpacked model, and so are the numbers.
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        pieces = [
            causal_attention(
                *(states[:, :, start:end] for states in (query, key, value)), scale=self.scale, window=self.window
            )
            for start, end in itertools.pairwise(bounds)
        ]
        return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1).reshape(-1, 1, heads * width)

    def _context_parts(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: Sequence[int], context: ContextPart
    ) -> torch.Tensor:
        """Compute attention for this rank's two chunks of each sequence, over the keys and values of all ranks:
        [tokens of this rank, heads or groups, d] -> [tokens of this rank, 1, heads * d]."""
        heads, width = query.shape[1:]
        gathered = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=context.group)
        key, value = gathered[context.order].transpose(0, 1).unsqueeze(0).split(width, dim=-1)
        query = query.transpose(0, 1).unsqueeze(0)
        pieces, row = [], 0
        for start, end in itertools.pairwise(bounds):
            chunk = (end - start) // (2 * context.size)
            for part in (context.rank, 2 * context.size - 1 - context.rank):
                seen = (part + 1) * chunk
                piece = torch.nn.functional.scaled_dot_product_attention(
                    query[:, :, row : row + chunk],
                    key[:, :, start : start + seen],
                    value[:, :, start : start + seen],
                    attn_mask=attention_bias.causal_lower_right(chunk, seen),
                    scale=self.scale,
                    enable_gqa=key.shape[1] != heads,
                )
                pieces.append(piece)
                row += chunk
        return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1).reshape(-1, 1, heads * width)
