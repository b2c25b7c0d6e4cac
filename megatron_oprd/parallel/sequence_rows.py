"""Gather and scatter rows of which sequence-parallel ranks have different numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def gather_rows(rows: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Gather [own rows, ...] to [rows of all ranks, ...], in the order of the ranks. One all_gather over `group`.

    `counts`: the number of rows of each rank.
    """
    if not any(counts):
        return rows
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def scatter_sum_rows(rows: torch.Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Sum [rows of all ranks, ...] over the ranks, and return this rank's rows. One reduce_scatter over `group`.

    This is the transpose of `gather_rows`.
    """
    if not any(counts):
        return rows
    padded = rows.new_zeros(len(counts), max(counts), *rows.shape[1:])
    for part, of_rank in zip(padded, rows.split(list(counts)), strict=True):
        part[: len(of_rank)] = of_rank
    own = padded.new_empty(padded.shape[1:])
    dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=group)
    return own[: counts[dist.get_rank(group)]]
