"""Convert Hugging Face tensors to Megatron parameters and back, bit for bit. No communication."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_oprd.hf.names import Entry
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.types import ModelSpec


def fill_shard(
    shard: torch.Tensor, entry: Entry, reader: HFReader, spec: ModelSpec, rank: int = 0, size: int = 1
) -> None:
    """Fill the shard of an entry on tensor-parallel rank `rank` of `size`, cast to the dtype of the shard.

    Only the rows of this rank are read, from the mapped file to their place in the shard.
    """
    if not entry.cut:
        rank, size = 0, 1
    if entry.layout in ("qkv", "gate_up"):
        _fill_parts(_parts(shard, entry, spec, size), entry, reader, rank, size)
        return
    (name,), rows = entry.hf, len(shard)
    if entry.layout == "columns":
        width = shard.shape[1]
        shard.copy_(reader.read(name)[:, rank * width : (rank + 1) * width])
    elif entry.layout == "copy":
        shard.copy_(reader.read(name))
    else:
        present = rows
        if entry.layout == "vocabulary":  # the last ranks have padding
            present = max(min(rows, spec.vocab_size - rank * rows), 0)
            shard[present:].zero_()
        if present:
            shard[:present].copy_(reader.read_rows(name, rank * rows, rank * rows + present))


def _parts(shard: torch.Tensor, entry: Entry, spec: ModelSpec, size: int) -> Sequence[torch.Tensor]:
    """Return views [groups, rows of a group, ...] of a shard: query, key and value, or gate and up projection."""
    if entry.layout == "gate_up":
        return shard.unflatten(0, (1, -1)).chunk(2, dim=1)
    # Megatron-Core splits the projection by query group: [groups, (queries of the group + key + value) * d, ...].
    queries = spec.num_attention_heads // spec.num_query_groups * spec.head_dim
    groups = shard.unflatten(0, (spec.num_query_groups // size, -1))
    return groups.split([queries, spec.head_dim, spec.head_dim], dim=1)


def _fill_parts(parts: Sequence[torch.Tensor], entry: Entry, reader: HFReader, rank: int, size: int) -> None:
    first = 0  # row of the part in its tensor
    for number, part in enumerate(parts):
        rows = part.shape[0] * part.shape[1]
        start = first + rank * rows
        name = entry.hf[number] if len(entry.hf) > 1 else entry.hf[0]
        part.copy_(reader.read_rows(name, start, start + rows).unflatten(0, (part.shape[0], -1)))
        if len(entry.hf) == 1:  # one tensor with the parts concatenated
            first += size * rows


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
