"""Convert Hugging Face tensors to Megatron parameters and back, bit for bit. No communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_oprd.hf.names import Entry
from megatron_oprd.types import ModelSpec


def to_megatron(entry: Entry, tensors: Sequence[torch.Tensor], spec: ModelSpec) -> torch.Tensor:
    """Return the full Megatron parameter of an entry from its Hugging Face tensors, in the order of `entry.hf`."""
    if entry.layout == "qkv":
        # [groups, (queries of the group + key + value) * d, ...]: Megatron-Core splits the projection by query group.
        if len(tensors) == 1:
            keys = spec.num_query_groups * spec.head_dim
            tensors = tensors[0].split((spec.num_attention_heads * spec.head_dim, keys, keys))
        groups = [tensor.unflatten(0, (spec.num_query_groups, -1)) for tensor in tensors]
        return torch.cat(groups, dim=1).flatten(0, 1)
    return torch.cat(list(tensors), dim=0) if entry.layout == "gate_up" else tensors[0]


def from_megatron(entry: Entry, parameter: torch.Tensor, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors of a full Megatron parameter by name, without vocabulary padding."""
    if entry.layout == "qkv":
        queries = spec.num_attention_heads // spec.num_query_groups * spec.head_dim
        groups = parameter.unflatten(0, (spec.num_query_groups, -1))
        pieces = groups.split([queries, spec.head_dim, spec.head_dim], dim=1)
        parts = [piece.flatten(0, 1) for piece in pieces]
        tensors = parts if len(entry.hf) == len(parts) else [torch.cat(parts)]
    elif entry.layout == "gate_up":
        tensors = list(parameter.chunk(len(entry.hf), dim=0))
    elif entry.layout == "vocabulary":
        tensors = [parameter[: spec.vocab_size]]
    else:
        tensors = [parameter]
    return {name: tensor.contiguous() for name, tensor in zip(entry.hf, tensors, strict=True)}


def shard(entry: Entry, parameter: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Return the shard of a full Megatron parameter on tensor-parallel rank `rank` of `size`."""
    if not entry.cut:
        return parameter
    if entry.layout == "columns":
        return parameter.chunk(size, dim=1)[rank]
    if entry.layout == "gate_up":
        return torch.cat([half.chunk(size, dim=0)[rank] for half in parameter.chunk(2, dim=0)])
    if entry.layout == "vocabulary":
        missing = -parameter.shape[0] % size
        parameter = torch.cat([parameter, parameter.new_zeros(missing, parameter.shape[1])]) if missing else parameter
    return parameter.chunk(size, dim=0)[rank]


def unshard(entry: Entry, shards: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the full Megatron parameter from the shards of all tensor-parallel ranks, in rank order.

    For an entry that is not sharded, the first element is enough.
    """
    if not entry.cut:
        return shards[0]
    if entry.layout == "columns":
        return torch.cat(list(shards), dim=1)
    if entry.layout == "gate_up":
        halves = zip(*(piece.chunk(2, dim=0) for piece in shards), strict=True)
        return torch.cat([piece for half in halves for piece in half])
    return torch.cat(list(shards), dim=0)
