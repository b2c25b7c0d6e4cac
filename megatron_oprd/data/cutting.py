"""Which rows of a micro-batch a rank holds under context and sequence parallelism. Pure, no communication."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from megatron_oprd.types import PackedBatch, Selection


def zigzag_rows(bounds: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """The rows [tokens / size] int64 of context-parallel rank `rank` of `size`, in the order in which it holds them.

    Each sequence is cut into 2 * size chunks, of which a rank holds the one `rank` places from the start and the one
    `rank` places from the end: under causal attention all ranks then do the same work. `bounds`: cumulative lengths,
    each length a multiple of 2 * size.
    """
    pieces = []
    for start, end in itertools.pairwise(bounds):
        chunk = (end - start) // (2 * size)
        for part in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + part * chunk, start + (part + 1) * chunk))
    return torch.cat(pieces)


def cut(
    batch: PackedBatch, *, context_rank: int = 0, context_size: int = 1, sequence_rank: int = 0, sequence_size: int = 1
) -> PackedBatch:
    """The part of a whole micro-batch that one rank works on.

    Tokens are those of the context-parallel rank. The rows that the loss reads are those of its hidden states, which
    sequence parallelism cuts once more, into `sequence_size` runs: `selected` counts from the start of this rank's.
    `cu_seqlens` stay those of the whole.
    """
    rows, order = torch.arange(batch.num_tokens), batch.context_order
    if context_size > 1:
        bounds = batch.cu_seqlens.tolist()
        of_ranks = [zigzag_rows(bounds, rank, context_size) for rank in range(context_size)]
        rows, order = of_ranks[context_rank], torch.cat(of_ranks).argsort()
    held = rows.chunk(sequence_size)[sequence_rank]
    place = torch.full((batch.num_tokens,), -1)
    place[held] = torch.arange(len(held))
    return dataclasses.replace(
        batch,
        tokens=batch.tokens[rows],
        position_ids=batch.position_ids[rows],
        response_mask=batch.response_mask[rows],
        sequence_ids=batch.sequence_ids[rows],
        representation=_cut_selection(batch.representation, place),
        output=_cut_selection(batch.output, place),
        context_order=order,
    )


def _cut_selection(selection: Selection, place: torch.Tensor) -> Selection:
    """What of a selection lies where `place`, [tokens] int64, gives its rows a place of this rank and not -1."""
    kept = place[selection.selected] >= 0
    mine = Selection(**{field.name: getattr(selection, field.name)[kept] for field in dataclasses.fields(selection)})
    return dataclasses.replace(mine, selected=place[mine.selected])
