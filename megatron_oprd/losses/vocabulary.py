"""A vocabulary cut over ranks: the sums, look-ups and rankings that a loss over it needs.

Nothing here is differentiated. The loss that uses it writes its gradient out, so no collective needs a backward: an
all_reduce inside autograd is where sharded losses get the value right and the gradient wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_NO_ID = 2**40  # of a candidate that fills up a shard narrower than k; sorts after every real id


@dataclass(frozen=True)
class VocabularyShard:
    """The columns of the vocabulary that this rank holds.

    `start` is the id of the first one, `group` are the ranks that hold the others (None: this rank holds all). Columns
    are real entries, so widths differ where padding was cut off, down to 0. Every rank of `group` has the same tokens
    and makes the same calls; without tokens nothing is sent. `widest`: what no rank's width exceeds, the same on every
    rank, which bounds what a ranking sends; None: not known.
    """

    start: int = 0
    group: dist.ProcessGroup | None = None
    widest: int | None = None

    def sum(self, values: Tensor) -> Tensor:
        """Sum over `group`, in place, the same bits on every rank. One all_reduce."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Maximum over `group`, in place. One all_reduce."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor, ids: Tensor) -> Tensor:
        """values [n, width] at ids [n, m] of the whole vocabulary -> [n, m], the same on every rank. One all_reduce."""
        return self.sum(self.pick(values, ids))

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """This rank's part of `gather`: zero at ids that other ranks hold. No communication."""
        if values.shape[1] == 0:
            return values.new_zeros(ids.shape)
        columns, held = self._columns(values, ids)
        return values.gather(1, columns).masked_fill_(~held, 0)

    def add_(self, values: Tensor, ids: Tensor, summands: Tensor) -> Tensor:
        """Adds summands [n, m] to values [n, width] at those of the ids [n, m] that this rank holds, in place.
        An id may come twice where its other summand is zero. No communication."""
        if values.shape[1] == 0:
            return values
        columns, held = self._columns(values, ids)
        return values.scatter_add_(1, columns, summands.masked_fill(~held, 0))

    def top(self, logits: Tensor, k: int) -> Tensor:
        """Ids of the k highest of logits [n, width], [n, k] int64: highest first, of equals the lower id first, the
        same for every cut of the vocabulary. k beyond the whole vocabulary means all of it. One all_gather
        [2, n, min(k, widest)].
        """
        tokens, width = logits.shape
        if tokens == 0:
            return torch.empty(0, k, dtype=torch.int64, device=logits.device)
        columns = _top_columns(logits, min(k, width))
        values, ids = logits.gather(1, columns), columns + self.start
        if self.group is not None:
            values, ids = self._all_candidates(values, ids, k if self.widest is None else min(k, self.widest))
        by_id = ids.argsort(dim=-1)
        by_value = values.gather(1, by_id).argsort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, by_id).gather(1, by_value)[:, :k]
        if width < k:  # asked only where it can be so: it waits for the device
            ids = ids[:, : int((ids[0] < _NO_ID).sum())]
        return ids

    def normalize_(self, *values: Tensor) -> Tensor:
        """Turns each [n, width] into its log-softmax over the whole vocabulary, in place; returns the log-sum-exps,
        stacked [len(values), n]. Two all_reduces and one temporary [n, width]."""
        highest = self.max(torch.stack([_highest(one) for one in values]))
        for one, shift in zip(values, highest, strict=True):
            one.sub_(shift[:, None])
        log_sums = self.sum(torch.stack([one.exp().sum(-1) for one in values])).log_()
        # In two steps: log(sum) is small, the highest logit may be large and would round it away.
        for one, log_sum in zip(values, log_sums, strict=True):
            one.sub_(log_sum[:, None])
        return highest.add_(log_sums)

    def _all_reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is not None and values.numel() > 0:
            dist.all_reduce(values, op=operation, group=self.group)
        return values

    def _columns(self, values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        columns, width = ids - self.start, values.shape[1]
        return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)

    def _all_candidates(self, values: Tensor, ids: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Values and ids of every rank's candidates, up to `most` of each, [n, ranks * most]. float64 holds both
        exactly."""
        tokens, width = values.shape
        mine = torch.full((2, tokens, most), -torch.inf, dtype=torch.float64, device=values.device)
        mine[1] = _NO_ID
        mine[0, :, :width], mine[1, :, :width] = values, ids
        everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(everyones, mine, group=self.group)
        values, wide_ids = torch.cat(everyones, dim=-1)
        return values, wide_ids.long()


def _highest(values: Tensor) -> Tensor:
    return values.amax(-1) if values.shape[1] else values.new_full(values.shape[:1], -torch.inf)


def _top_columns(logits: Tensor, k: int) -> Tensor:
    """The k highest columns of each row, [n, k], unordered, of equals the lower columns.

    torch.topk takes any of several equals, and bf16 logits often tie at the k-th place: which columns are chosen would
    then depend on the cut. Such rows take the strictly higher ones and fill up with the lowest of the tied.
    """
    tokens, width = logits.shape
    if k == width:
        return torch.arange(width, device=logits.device).repeat(tokens, 1)
    values, columns = logits.topk(k + 1)
    tied = (values[:, k] == values[:, k - 1]).nonzero().squeeze(1)
    values, columns = values[:, :k], columns[:, :k]
    if len(tied) > 0:
        threshold = values[tied, k - 1 :]
        backward = -torch.arange(width, device=logits.device, dtype=torch.int32)
        lowest_tied = -torch.where(logits[tied] == threshold, backward, -width).topk(k).values.long()
        higher = values[tied] > threshold
        places = torch.arange(k, device=logits.device) - higher.sum(-1, keepdim=True)
        columns[tied] = torch.where(higher, columns[tied], lowest_tied.gather(1, places.clamp_min(0)))
    return columns
