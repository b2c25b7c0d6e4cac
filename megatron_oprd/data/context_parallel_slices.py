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
    rank_of_row, place = torch.full((batch.num_tokens,), -1), torch.full((batch.num_tokens,), -1)
    for rank, held in enumerate(rows.chunk(sequence_size)):
        rank_of_row[held], place[held] = rank, torch.arange(len(held))

    def mine(selection: Selection) -> Selection:
        ranks = rank_of_row[selection.selected]
        kept = ranks == sequence_rank
        return Selection(
            selected=place[selection.selected][kept],
            rows=selection.rows[kept],
            weights=selection.weights[kept],
            token_ids=selection.token_ids[kept],
            teachers=selection.teachers[kept],
            of_ranks=tuple(ranks[ranks >= 0].bincount(minlength=sequence_size).tolist()),
        )

    return dataclasses.replace(
        batch,
        tokens=batch.tokens[rows],
        position_ids=batch.position_ids[rows],
        response_mask=batch.response_mask[rows],
        sequence_ids=batch.sequence_ids[rows],
        lengths=batch.lengths[rows],
        representation=mine(batch.representation),
        output=mine(batch.output),
        context_order=order,
    )
