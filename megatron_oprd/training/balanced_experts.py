"""Experts without values: every rank's tokens go to all experts alike, where a real router would have to be read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from megatron_oprd.training.live_bytes import LiveBytes


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
    ):
        yield


def balanced_counts(tokens: int, choices: int, experts: int) -> np.ndarray:
    """Tokens [experts] of one rank that each expert gets; they add up to tokens x choices."""
    share, more = divmod(tokens * choices, experts)
    return np.full(experts, share) + (np.arange(experts) < more)


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
    # Where chunks lie is made with the dispatcher, when tensors have no values any more.
    chunks = np.arange(experts * dispatcher.tp_size)
    dispatcher.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
    dispatcher.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()
    return mine * senders
