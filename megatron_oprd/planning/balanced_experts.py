"""Replacements for Megatron-Core's expert layers while memory is traced: every expert gets the same number of tokens.

Traced tensors have no values, so a router cannot choose. One module stands for all experts of a rank: the memory of
experts depends on the number of their tokens only, and a single module saves thousands of small operations.
`megatron_patches.py` puts these functions in place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP

from megatron_oprd.planning.memory_trace import LiveBytes

_init_experts = SequentialMLP.__init__
_permute = token_dispatcher.permute


class _SplitSizes(list[int]):
    """A list of split sizes with the `tolist` method that Megatron-Core calls."""

    def tolist(self) -> list[int]:
        return list(self)


def balanced_counts(tokens: int, choices: int, experts: int) -> np.ndarray:
    """Return the tokens [experts] that each expert gets from one rank. They differ by at most one.

    `choices`: experts per token. The counts add up to `tokens * choices`.
    """
    share, more = divmod(tokens * choices, experts)
    return np.full(experts, share) + (np.arange(experts) < more)


def preprocess(dispatcher: Any, routing_map: torch.Tensor) -> np.ndarray:
    """Replace `MoEAlltoAllTokenDispatcher.preprocess`: set split sizes as if every rank had as many tokens as this one.

    Returns the tokens [local experts] of each expert on this rank.
    """
    tokens, experts = routing_map.shape
    counts = balanced_counts(tokens, dispatcher.config.moe_router_topk, experts)
    senders = dispatcher.ep_size * dispatcher.tp_size
    first, num_local = dispatcher.local_expert_indices[0], dispatcher.num_local_experts
    local_counts = counts[first : first + num_local]
    received = int(local_counts.sum())
    dispatcher.num_out_tokens = int(counts.sum())
    if senders > 1:
        dispatcher.input_splits = _SplitSizes(map(int, counts.reshape(dispatcher.ep_size, num_local).sum(axis=1)))
        dispatcher.output_splits = _SplitSizes([received] * dispatcher.ep_size)
        dispatcher.output_splits_tp = _SplitSizes([received * dispatcher.ep_size] * dispatcher.tp_size)
    dispatcher.num_global_tokens_per_local_expert = np.tile(local_counts, (senders, 1))
    return local_counts * senders


def permute_with(live: LiveBytes) -> Callable[..., Any]:
    """Return a replacement for `token_dispatcher.permute`, whose `masked_select` finds as many rows as are sent."""

    def permute(*args: Any, num_out_tokens: int, **kwargs: Any) -> Any:
        with live.finding(num_out_tokens):
            return _permute(*args, num_out_tokens=num_out_tokens, **kwargs)

    return permute


def sort_chunks(tokens: torch.Tensor, *args: Any, probs: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """Replace `token_dispatcher.sort_chunks_by_idxs`: copy the rows without sorting them."""
    return tuple(None if one is None else torch.cat([one, one[:0]]) for one in (tokens, probs))


def init_experts(experts: Any, count: int, *args: Any, **kwargs: Any) -> None:
    """Replace `SequentialMLP.__init__`: build one expert whose weights have the rows of all `count` experts."""
    _init_experts(experts, 1, *args, **kwargs)
    experts.num_local_experts = count
    for linear in (experts.local_experts[0].linear_fc1, experts.local_experts[0].linear_fc2):
        weight, attributes = linear.weight, vars(linear.weight)
        linear.weight = torch.nn.Parameter(weight.new_empty(count * len(weight), weight.shape[1]))
        vars(linear.weight).update(attributes)


def forward_experts(
    experts: Any, tokens: torch.Tensor, counts: np.ndarray, probs: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """Replace `SequentialMLP.forward`: run all `tokens` [tokens, hidden] through one expert.

    With several experts the output is copied, because Megatron-Core concatenates the outputs of its experts.
    """
    expert, count = experts.local_experts[0], len(counts)
    weights = {name: weight[: len(weight) // count] for name, weight in expert.named_parameters()}
    output, _ = torch.func.functional_call(expert, weights, (tokens, probs))
    return (output if count == 1 else torch.cat([output, output[:0]])), None
