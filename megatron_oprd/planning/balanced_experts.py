"""Experts without values: every rank's tokens go to all experts alike, where a real router would have to be read, and
one expert stands for all of a rank, as what they keep goes by tokens: thousands of small operations are saved."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_oprd.planning.memory_trace import LiveBytes

_BUILD = SequentialMLP.__init__


class _Sizes(list[int]):
    """Split sizes as mcore reads them: a list that is also asked for one."""

    def tolist(self) -> list[int]:
        return list(self)


@contextlib.contextmanager
def balanced_experts(live: LiveBytes) -> Iterator[None]:
    """Inside the block mcore's dispatcher sends each expert (tokens x experts per token / experts) tokens of each rank,
    as even as they go. No communication."""
    permute = token_dispatcher.permute

    def chosen(*args: Any, num_out_tokens: int, **kwargs: Any) -> Any:
        with live.finding(num_out_tokens):
            return permute(*args, num_out_tokens=num_out_tokens, **kwargs)

    with (
        mock.patch.object(MoEAlltoAllTokenDispatcher, "preprocess", _preprocess),
        mock.patch.object(token_dispatcher, "permute", chosen),
        mock.patch.object(token_dispatcher, "sort_chunks_by_idxs", _one_copy),
        mock.patch.object(SequentialMLP, "__init__", _one_for_all),
        mock.patch.object(SequentialMLP, "forward", _all_at_once),
    ):
        yield


def balanced_counts(tokens: int, choices: int, experts: int) -> np.ndarray:
    """Tokens [experts] of one rank that each expert gets; they add up to tokens x choices."""
    share, more = divmod(tokens * choices, experts)
    return np.full(experts, share) + (np.arange(experts) < more)


def _one_for_all(experts: Any, count: int, *args: Any, **kwargs: Any) -> None:
    """`SequentialMLP.__init__`, building the first of `count` experts with as many rows of weights as all have."""
    _BUILD(experts, 1, *args, **kwargs)
    experts.num_local_experts = count
    for linear in (experts.local_experts[0].linear_fc1, experts.local_experts[0].linear_fc2):
        one, others = linear.weight, vars(linear.weight)
        linear.weight = torch.nn.Parameter(one.new_empty(count * len(one), one.shape[1]))
        vars(linear.weight).update(others)


def _all_at_once(
    experts: Any, tokens: torch.Tensor, counts: np.ndarray, probs: torch.Tensor
) -> tuple[torch.Tensor, None]:
    """What `SequentialMLP` keeps of [tokens, hidden], were all its experts one; of several it joins the outputs."""
    expert, count = experts.local_experts[0], len(counts)
    weights = {name: weight[: len(weight) // count] for name, weight in expert.named_parameters()}
    output, _ = torch.func.functional_call(expert, weights, (tokens, probs))
    return (output if count == 1 else torch.cat([output, output[:0]])), None


def _one_copy(tokens: torch.Tensor, *args: Any, probs: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """What `sort_chunks_by_idxs` makes: the same rows, joined in another order."""
    return tuple(None if one is None else torch.cat([one, one[:0]]) for one in (tokens, probs))


def _preprocess(dispatcher: Any, routing_map: torch.Tensor) -> np.ndarray:
    """What `MoEAlltoAllTokenDispatcher.preprocess` finds out, when all ranks have as many tokens as this one."""
    tokens, experts = routing_map.shape
    counts = balanced_counts(tokens, dispatcher.config.moe_router_topk, experts)
    senders = dispatcher.ep_size * dispatcher.tp_size
    first, local = dispatcher.local_expert_indices[0], dispatcher.num_local_experts
    mine = counts[first : first + local]
    dispatcher.num_out_tokens = int(counts.sum())
    if senders > 1:
        dispatcher.input_splits = _Sizes(map(int, counts.reshape(dispatcher.ep_size, local).sum(axis=1)))
        dispatcher.output_splits = _Sizes([int(mine.sum())] * dispatcher.ep_size)
        dispatcher.output_splits_tp = _Sizes([int(mine.sum()) * dispatcher.ep_size] * dispatcher.tp_size)
    dispatcher.num_global_tokens_per_local_expert = np.tile(mine, (senders, 1))
    return mine * senders
