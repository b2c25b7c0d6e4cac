"""Rows that sequence-parallel ranks hold, in uneven numbers, brought together and cut apart again."""

from __future__ import annotations

import torch
import torch.distributed as dist


class SequenceRows:
    """`gather` brings the rows of all ranks of a group to each of them; `scatter_sum` is its transpose: the sum over
    ranks of the gathered rows, of which each keeps its own. Without a group both return what they are given.

    The numbers of rows are exchanged at the first `gather` and hold until `scatter_sum` ends the round.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self._counts: list[int] | None = None

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[own rows, ...] -> [rows of all ranks, ...], rank by rank. Communicates over the group."""
        if self.group is None:
            return rows
        counts = self._exchange_counts(rows)
        if not any(counts):
            return rows
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def scatter_sum(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows of all ranks, ...] -> [own rows, ...], summed over the ranks. Communicates over the group."""
        if self.group is None:
            return rows
        assert self._counts is not None, "scatter_sum is the transpose of a gather"
        counts, self._counts = self._counts, None
        if not any(counts):
            return rows
        most = max(counts)
        padded = rows.new_zeros(len(counts), most, *rows.shape[1:])
        for part, own in zip(padded, rows.split(counts), strict=True):
            part[: len(own)] = own
        own = padded.new_empty(padded.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1), group=self.group)
        return own[: counts[dist.get_rank(self.group)]]

    def _exchange_counts(self, rows: torch.Tensor) -> list[int]:
        if self._counts is None:
            own = torch.tensor([len(rows)], device=rows.device)
            counts = [torch.empty_like(own) for _ in range(dist.get_world_size(self.group))]
            dist.all_gather(counts, own, group=self.group)
            self._counts = [int(count) for count in counts]
        return self._counts
