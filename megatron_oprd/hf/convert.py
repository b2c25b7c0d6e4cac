"""Convert Hugging Face tensors to Megatron parameters and back, bit for bit. No communication."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from megatron_oprd.hf.names import Entry
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.model_spec import ModelSpec


def fill_shard(
    shard: torch.Tensor, entry: Entry, reader: HFReader, spec: ModelSpec, rank: int = 0, size: int = 1
) -> None:
    """Fill the shard of an entry on tensor-parallel rank `rank` of `size`, cast to the dtype of the shard.

    Only the rows of this rank are read, from the mapped file to their place in the shard.
    """
    if not entry.cut:
        rank, size = 0, 1
    if entry.layout in ("qkv", "gate_up", "delta"):
        for name, first, part in _parts(shard, entry, spec, size):
            leading = part.shape[: 1 + part.dim() - shard.dim()]
            rows = math.prod(leading)
            start = first * size + rank * rows
            part.copy_(reader.read_rows(name, start, start + rows).unflatten(0, leading))
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


def _parts(shard: torch.Tensor, entry: Entry, spec: ModelSpec, size: int) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield the parts of a shard in the order of the rows of their Hugging Face tensors.

    Yields: name of the tensor; rows of the tensor before the part, for the groups of this shard; the part. The part is
    a view of the shard [groups, ..., *], in which the dimensions before the shard's own other dimensions count rows.
    """
    groups, rows = _rows_of_group(shard, entry, spec, size)
    if len(entry.hf) == 1:  # one tensor with the parts concatenated
        names = [entry.hf[0]] * len(rows)
    elif len(rows) > len(entry.hf):  # the first tensor has several parts concatenated
        names = [*[entry.hf[0]] * (1 + len(rows) - len(entry.hf)), *entry.hf[1:]]
    else:
        names = list(entry.hf)
    before = dict.fromkeys(entry.hf, 0)
    views = shard.unflatten(0, (groups, -1)).split(rows, dim=1)
    for name, count, view in zip(names, rows, views, strict=True):
        if entry.layout == "qkv" and spec.output_gate and name == entry.hf[0]:
            # Queries, then gates of a group; in the Hugging Face tensor each head has its query and its gate.
            view = view.unflatten(1, (2, -1, spec.head_dim)).transpose(1, 2)
        yield name, before[name], view
        before[name] += groups * count


def _rows_of_group(shard: torch.Tensor, entry: Entry, spec: ModelSpec, size: int) -> tuple[int, list[int]]:
    """Return the number of groups in a shard, and the rows of each part of a group."""
    if entry.layout == "gate_up":
        return 1, [len(shard) // 2] * 2
    if entry.layout == "qkv":
        # Megatron-Core splits the projection by query group: [groups, (queries of the group + key + value) * d, ...].
        queries = spec.num_attention_heads // spec.num_query_groups * spec.head_dim * (2 if spec.output_gate else 1)
        return spec.num_query_groups // size, [queries, spec.head_dim, spec.head_dim]
    sizes = spec.delta_net
    assert sizes is not None
    groups = sizes.num_key_heads // size
    if len(shard) == groups * sizes.convolved:  # the convolution
        return groups, [sizes.key_dim, sizes.key_dim, sizes.values_per_key * sizes.value_dim]
    each, values = sizes.values_per_key, sizes.values_per_key * sizes.value_dim
    if len(entry.hf) == 2:  # the tensors have the order of the parameter
        return groups, [sizes.convolved + values, 2 * each]
    return groups, [sizes.key_dim, sizes.key_dim, values, values, each, each]


def from_megatron(entry: Entry, parameter: torch.Tensor, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors of a full Megatron parameter by name, without vocabulary padding."""
    if entry.layout in ("qkv", "gate_up", "delta"):
        pieces: dict[str, list[torch.Tensor]] = {name: [] for name in entry.hf}
        for name, _, part in _parts(parameter, entry, spec, 1):
            pieces[name].append(part.flatten(0, part.dim() - parameter.dim()))
        return {name: torch.cat(parts) if len(parts) > 1 else parts[0].contiguous() for name, parts in pieces.items()}
    (name,) = entry.hf
    tensor = parameter[: spec.vocab_size] if entry.layout == "vocabulary" else parameter
    return {name: tensor.contiguous()}


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
