"""Cut a micro-batch into the parts of context- and sequence-parallel ranks. No communication."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.data.packing import rows_of_teacher
from megatron_oprd.types import PackedBatch, Selection, SequenceGroups


def zigzag_rows(bounds: Sequence[int], rank: int, size: int) -> torch.Tensor:
    """Return the rows [tokens / size] int64 of one context-parallel rank, in the order of its hidden states.

    Each sequence is cut into 2 * size chunks. A rank has the chunk `rank` places from the start and the chunk `rank`
    places from the end: under causal attention all ranks then do the same work.

    Args:
        bounds: cumulative lengths of the sequences; each length is a multiple of 2 * size.
        rank: context-parallel rank.
        size: number of context-parallel ranks.
    """
    pieces = []
    for start, end in itertools.pairwise(bounds):
        chunk = (end - start) // (2 * size)
        for part in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(start + part * chunk, start + (part + 1) * chunk))
    return torch.cat(pieces)


@dataclass(frozen=True)
class Slice:
    """The place of a rank among the ranks that share the tokens of a micro-batch."""

    context_rank: int = 0
    context_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1  # 1 without sequence parallelism


def cut(batch: PackedBatch, place: Slice) -> PackedBatch:
    """Return the part of a whole micro-batch that one rank works on.

    The part has the tokens of the context-parallel rank. Sequence parallelism cuts the hidden states of these tokens
    once more, into `sequence_size` runs: `selected` counts from the start of this rank's run. `bounds` remain those of
    the whole sequences.
    """
    of_ranks, order = [torch.arange(batch.num_tokens)], None
    if place.context_size > 1:
        of_ranks = [zigzag_rows(batch.bounds, rank, place.context_size) for rank in range(place.context_size)]
        order = torch.cat(of_ranks).argsort()
    rows = of_ranks[place.context_rank]
    rank_of_row, place_of_row = torch.full((batch.num_tokens,), -1), torch.full((batch.num_tokens,), -1)
    for rank, own in enumerate(rows.chunk(place.sequence_size)):
        rank_of_row[own], place_of_row[own] = rank, torch.arange(len(own))

    def part_of(selection: Selection) -> Selection:
        ranks = rank_of_row[selection.selected]
        by_rank = [(ranks == rank).nonzero().flatten() for rank in range(place.sequence_size)]
        own = by_rank[place.sequence_rank]
        return Selection(
            selected=place_of_row[selection.selected[own]],
            token_numbers=selection.token_numbers[own],
            weights=selection.weights[own],
            token_ids=selection.token_ids[own],
            teachers=selection.teachers[own],
            rows_per_rank=tuple(len(places) for places in by_rank),
            rows_of_teacher=rows_of_teacher(selection.teachers[torch.cat(by_rank)]),
            by_sequence=selection.by_sequence,
            groups=_sequence_groups(selection, batch.bounds, of_ranks, place) if selection.by_sequence else None,
        )

    return PackedBatch(
        tokens=batch.tokens[rows],
        position_ids=batch.position_ids[rows],
        lengths=batch.lengths[rows],
        bounds=batch.bounds,
        representation=part_of(batch.representation),
        output=part_of(batch.output),
        flow=None if batch.flow is None else part_of(batch.flow),
        context_order=order,
    )


def _sequence_groups(
    selection: Selection, bounds: Sequence[int], of_context_ranks: Sequence[torch.Tensor], place: Slice
) -> SequenceGroups:
    """Return the selected tokens of a whole micro-batch by sequence, and those of one rank among them.

    Args:
        selection: the tokens of the whole micro-batch, sequence after sequence.
        bounds: cumulative lengths of its sequences.
        of_context_ranks: the rows of each context-parallel rank.
        place: the rank.
    """
    rank_of_row, num_ranks = torch.empty(bounds[-1], dtype=torch.int64), 0
    for rows in of_context_ranks:
        for own in rows.chunk(place.sequence_size):
            rank_of_row[own] = num_ranks
            num_ranks += 1
    ranks = rank_of_row[selection.selected]
    gathered = ranks.argsort(stable=True).argsort()  # the place of each position among the gathered rows
    sequences = torch.bucketize(selection.selected, torch.tensor(bounds), right=True)
    _, lengths = sequences.unique_consecutive(return_counts=True)
    first = lengths.cumsum(0) - lengths
    width = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(width).expand(len(lengths), width)
    grid = gathered[first[:, None] + steps.minimum(lengths[:, None] - 1)]
    in_grid = (torch.arange(width) < lengths[:, None]).flatten().nonzero().flatten()
    own_rank = place.context_rank * place.sequence_size + place.sequence_rank
    return SequenceGroups(
        rows_per_rank=tuple(ranks.bincount(minlength=num_ranks).tolist()),
        grid=grid,
        places=in_grid[ranks == own_rank],
        lengths=lengths,
        weights=selection.weights[first] * lengths,
    )
