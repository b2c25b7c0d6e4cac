"""Floating-point operations of a decoder, computed from its sizes.

A multiplication and an addition count as two operations. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.planning.delta_net_costs import linear_layers_below, rule_flops


def linear_flops(spec: ModelSpec, layer: int) -> int:
    """Return the operations of the matrix products of one layer (0-based) in the forward pass, per token.

    In a layer with experts, only the experts that process the token and the shared expert count.
    """
    attention = spec.hidden_size * _projected_width(spec, layer)
    if layer in spec.sparse_layers:
        experts = spec.experts_per_token * 3 * spec.hidden_size * spec.moe_ffn_hidden_size
        shared = spec.hidden_size * (3 * spec.shared_ffn_hidden_size + (spec.shared_ffn_hidden_size > 0))  # its gate
        return 2 * (attention + spec.hidden_size * spec.num_experts + experts + shared)
    return 2 * (attention + 3 * spec.hidden_size * spec.ffn_hidden_size)


def _projected_width(spec: ModelSpec, layer: int) -> int:
    """Return the outputs of the projections before attention or Gated DeltaNet, and the inputs of the one after."""
    if spec.delta_net is not None and layer in spec.linear_layers:
        sizes = spec.delta_net
        return sizes.num_key_heads * sizes.projected + sizes.num_value_heads * sizes.value_dim
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    return (3 if spec.output_gate else 2) * queries + 2 * keys


def attention_flops(spec: ModelSpec, lengths: Sequence[int], *, window: int = 0) -> int:
    """Return the operations of the causal attention of one layer in the forward pass: scores and weighted values.

    `lengths`: tokens of each sequence. A token attends to itself and to earlier tokens of its sequence, with a window
    to at most `window` tokens.
    """
    pairs = sum(length**2 - (max(length - window, 0) ** 2 if window else 0) for length in lengths)  # twice their number
    return 2 * spec.num_attention_heads * spec.head_dim * pairs


def _attention_of_layers(spec: ModelSpec, layers: int, lengths: Sequence[int]) -> int:
    windowed = sum(layer < layers for layer in spec.windowed_layers)
    full = (layers - windowed - linear_layers_below(spec, layers)) * attention_flops(spec, lengths)
    return full + windowed * attention_flops(spec, lengths, window=spec.sliding_window)


def _rules_of_layers(spec: ModelSpec, layers: int, lengths: Sequence[int]) -> int:
    return 0 if spec.delta_net is None else linear_layers_below(spec, layers) * rule_flops(spec.delta_net, lengths)


def forward_flops(spec: ModelSpec, layers: int, lengths: Sequence[int]) -> int:
    """Return the operations of a forward pass through the lowest `layers` layers, without the LM head.

    `lengths`: tokens of each sequence.
    """
    linear = sum(linear_flops(spec, layer) for layer in range(layers))
    rules = _rules_of_layers(spec, layers, lengths)
    return linear * sum(lengths) + _attention_of_layers(spec, layers, lengths) + rules


def backward_flops(spec: ModelSpec, layers: int, lengths: Sequence[int]) -> int:
    """Return the operations of the backward pass of `forward_flops`: gradients of activations and of weights.

    Each matrix product, also inside the gated delta rule, needs two products in the backward pass. Attention needs five
    products where the forward pass has two, because its scores are computed again (Dao, arXiv 2307.08691).
    """
    linear = sum(linear_flops(spec, layer) for layer in range(layers))
    products = linear * sum(lengths) + _rules_of_layers(spec, layers, lengths)
    return 2 * products + math.ceil(2.5 * _attention_of_layers(spec, layers, lengths))


def head_flops(spec: ModelSpec, tokens: int) -> int:
    """Return the operations of the LM head in the forward pass."""
    return 2 * spec.hidden_size * spec.vocab_size * tokens
