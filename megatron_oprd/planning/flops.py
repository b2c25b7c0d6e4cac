"""Floating-point operations of a decoder, counted from its sizes; a multiplication and an addition are two. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_oprd.types import ModelSpec


def linear_flops(spec: ModelSpec, layer: int) -> int:
    """Of the matrix products of one block (0-based), forward, for a token: those of the experts that it goes to."""
    width, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    attention = spec.hidden_size * (width + 2 * keys) + width * spec.hidden_size
    if layer in spec.sparse_layers:
        experts = spec.experts_per_token * 3 * spec.hidden_size * spec.moe_ffn_hidden_size
        return 2 * (attention + spec.hidden_size * spec.num_experts + experts)
    return 2 * (attention + 3 * spec.hidden_size * spec.ffn_hidden_size)


def attention_flops(spec: ModelSpec, lengths: Sequence[int]) -> int:
    """Of the scores and the weighted values of one block, forward: a token sees itself and what stands before it."""
    return 2 * spec.num_attention_heads * spec.head_dim * sum(length * length for length in lengths)


def forward_flops(spec: ModelSpec, blocks: int, lengths: Sequence[int]) -> int:
    """Of the lowest `blocks` over whole sequences of these lengths, without LM head."""
    linear = sum(linear_flops(spec, layer) for layer in range(blocks))
    return linear * sum(lengths) + blocks * attention_flops(spec, lengths)


def backward_flops(spec: ModelSpec, blocks: int, lengths: Sequence[int]) -> int:
    """Of the gradients of activations and weights: twice the products, and of attention five products for its two
    (Dao, arXiv 2307.08691: the scores are made again)."""
    linear = sum(linear_flops(spec, layer) for layer in range(blocks))
    return 2 * linear * sum(lengths) + math.ceil(2.5 * blocks * attention_flops(spec, lengths))


def head_flops(spec: ModelSpec, tokens: int) -> int:
    """Of the LM head, forward."""
    return 2 * spec.hidden_size * spec.vocab_size * tokens
