"""Attention by torch's SDPA, one sequence at a time. Under context parallelism every rank gathers all."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch

from ...on_cpu import Exchange
from ..module.base import TransformerEngineBaseModule


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        *,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
    ):
        super().__init__()
        key_channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.qkv_format, self.attn_mask_type = qkv_format, attn_mask_type
        self.attention_dropout, self.get_rng_state_tracker = attention_dropout, get_rng_state_tracker
        self.softmax_scale = key_channels**-0.5 if softmax_scale is None else softmax_scale
        self.num_heads, self.num_groups = num_attention_heads // tp_size, (num_gqa_groups or num_attention_heads)
        self.num_groups //= tp_size
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self.register_load_state_dict_post_hook(_forgive_extra_state)

    def set_context_parallel_group(self, cp_group, cp_global_ranks, cp_stream, cp_comm_type: str = "p2p") -> None:
        if isinstance(cp_group, list):
            raise NotImplementedError(f"{cp_comm_type=}")
        self.cp_group, self.cp_global_ranks, self.cp_comm_type = cp_group, cp_global_ranks, cp_comm_type

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
    ) -> torch.Tensor:
        """sbhd: [positions, batch, heads, channels] -> [positions, batch, heads * channels]; thd: one dimension less,
        and every sequence sees itself alone. The cu_seqlens count the tokens of all ranks, padded: with the gaps."""
        assert (query_layer.shape[-2], key_layer.shape[-2]) == (self.num_heads, self.num_groups)
        layout, mask = qkv_format or self.qkv_format, attn_mask_type or self.attn_mask_type
        if layout == "sbhd" and not mask.startswith("padding"):
            starts = None
        elif layout == "thd" and mask.startswith("padding"):
            starts = [0, *itertools.accumulate(cu_seqlens_q.diff().tolist())]
            padded = (cu_seqlens_q if cu_seqlens_q_padded is None else cu_seqlens_q_padded).tolist()
        else:
            raise NotImplementedError(f"qkv_format={layout}, attn_mask_type={mask}")
        tensors, own = [query_layer, key_layer, value_layer], None
        if self.cp_group is not None and torch.distributed.get_world_size(self.cp_group) > 1:
            size = torch.distributed.get_world_size(self.cp_group)
            order = _zigzag([0, size * len(query_layer)] if starts is None else padded, size)
            tensors = [_gathered(tensor, self.cp_group, order) for tensor in tensors]
            own = order.chunk(size)[torch.distributed.get_rank(self.cp_group)]
        if starts is None:
            batched = [tensor.permute(1, 2, 0, 3) for tensor in tensors]
            out = self._attend(*batched, mask, attention_mask).permute(2, 0, 1, 3)
        else:
            if cu_seqlens_kv is not None and not torch.equal(cu_seqlens_kv, cu_seqlens_q):
                raise NotImplementedError("queries and keys of different lengths in one packed batch")
            out = torch.zeros_like(tensors[0])
            for i, (start, end) in enumerate(itertools.pairwise(starts)):
                rows = slice(padded[i], padded[i] + end - start)
                one = [tensor[rows].transpose(0, 1) for tensor in tensors]
                out[rows] = self._attend(*one, mask.removeprefix("padding_"), None).transpose(0, 1)
        return (out if own is None else out[own]).flatten(-2)

    def _attend(self, query, key, value, mask_type: str, attention_mask: torch.Tensor | None) -> torch.Tensor:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        if mask_type == "causal":
            seen = seen.tril()
        elif mask_type == "causal_bottom_right":
            seen = seen.tril(key.shape[-2] - query.shape[-2])
        elif mask_type == "arbitrary":
            seen = ~attention_mask
        elif mask_type not in ("no_mask", "padding"):
            raise NotImplementedError(f"attn_mask_type={mask_type}")
        dropout = self.attention_dropout if self.training else 0.0
        fork = self.get_rng_state_tracker().fork() if dropout else contextlib.nullcontext()
        with fork:
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, seen, dropout, scale=self.softmax_scale, enable_gqa=True
            )


def _forgive_extra_state(module: torch.nn.Module, incompatible_keys: Any) -> None:
    """Megatron-Core does not save the attention's."""
    missing = incompatible_keys.missing_keys
    missing[:] = [key for key in missing if "core_attention._extra_state" not in key]


def _zigzag(starts: list[int], size: int) -> torch.Tensor:
    """Return the positions of the ranks, rank after rank: chunks r and 2 * size - 1 - r of each sequence."""
    positions: list[list[int]] = [[] for _ in range(size)]
    for start, end in itertools.pairwise(starts):
        assert (end - start) % (2 * size) == 0, f"a sequence of {end - start} tokens over {size} ranks"
        chunks = torch.arange(start, end).chunk(2 * size) if end > start else [torch.arange(0)] * 2 * size
        for rank in range(size):
            positions[rank] += chunks[rank].tolist() + chunks[2 * size - 1 - rank].tolist()
    return torch.tensor(positions, dtype=torch.long).flatten()


def _gathered(tensor: torch.Tensor, group: Any, order: torch.Tensor) -> torch.Tensor:
    everything = Exchange.apply(tensor, group, "gather", "reduce_scatter")
    return torch.empty_like(everything).index_copy(0, order, everything)
