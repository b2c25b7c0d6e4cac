"""Sums, look-ups and rankings over a vocabulary that is divided over ranks.

Autograd does not differentiate this file. Losses compute their gradients in closed form, so that no collective needs a
backward pass: a plain all_reduce inside autograd gives the right value and a wrong gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.runtime.fused import fused

CANDIDATES = 1024  # highest logits of a rank among which `lower_half` seeks its boundary first
_NO_ID = 2**40  # stands for a missing candidate of a shard narrower than k; sorts after every real id


@dataclass(frozen=True)
class VocabularyShard:
    """The part of the vocabulary on this rank: `width` columns without padding, as few as 0 on the last ranks.

    All ranks of `group` must have the same tokens and make the same calls. Without tokens nothing is sent.
    """

    start: int = 0  # the token id of the first column
    group: dist.ProcessGroup | None = None  # the ranks that share the vocabulary; None: this rank has all columns
    widest: int | None = None  # a bound on every rank's width, which limits what a ranking sends; None: not known

    def sum(self, values: Tensor) -> Tensor:
        """Sum over `group`, in place; the result is bitwise equal on all ranks. One all_reduce."""
        return self._all_reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Compute the maximum over `group`, in place. One all_reduce."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def gather(self, values: Tensor, ids: Tensor) -> Tensor:
        """Return the entries of values [n, width] at token ids [n, m], equal on all ranks. One all_reduce."""
        return self.sum(self.pick(values, ids))

    def pick(self, values: Tensor, ids: Tensor) -> Tensor:
        """Return this rank's part of `gather`: zero at the ids of other ranks. No communication."""
        if values.shape[1] == 0:
            return values.new_zeros(ids.shape)
        columns, is_local = self._columns(values, ids)
        return values.gather(1, columns).masked_fill_(~is_local, 0)

    def add_(self, values: Tensor, ids: Tensor, summands: Tensor) -> Tensor:
        """Add summands [n, m] to values [n, width], in place, at the ids [n, m] that are on this rank.

        An id may occur twice in a row if one of its summands is zero. No communication.
        """
        if values.shape[1] == 0:
            return values
        columns, is_local = self._columns(values, ids)
        return values.scatter_add_(1, columns, summands.masked_fill(~is_local, 0))

    def top(self, logits: Tensor, k: int) -> Tensor:
        """Return the ids [n, k] of the k highest logits [n, width]: the highest first, the lower id first among equals.

        The result does not depend on how many ranks share the vocabulary. A k above the size of the vocabulary means
        all of it. One all_gather of [2, n, min(k, widest)].
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
        if width < k:  # only then can ids be missing: the sum waits for the device
            ids = ids[:, : int((ids[0] < _NO_ID).sum())]
        return ids

    def lower_half(self, logits: Tensor) -> Tensor:
        """Return True [n, width] for the least likely tokens whose probabilities sum to at most one half.

        Tokens with equal logits are all in this half or all outside of it. The result therefore does not depend on how
        many ranks share the vocabulary. The sums are in float64.

        The boundary is sought among the CANDIDATES highest logits of each rank. In rows whose candidates have less than
        half of the probability, it is sought among all logits. 35 all_reduces of [n] in float32, 67 in float64, and 32
        or 64 more if there are such rows. Temporaries with the bytes of at most five float32 tensors [n, width] on a
        CPU, of one on a GPU.
        """
        candidates, floor = logits, logits.new_full(logits.shape[:1], -torch.inf)
        if logits.shape[1] > CANDIDATES:
            candidates = logits.topk(CANDIDATES, sorted=False).values
            floor = candidates.amin(-1)
        highest, floor = self.max(torch.stack([_highest(candidates), floor]))
        half = self.sum(_mass_above(logits, highest, torch.full_like(highest, -torch.inf))).div_(2)
        bound = self._boundary(candidates, highest, half)
        rest = (self.sum(_mass_above(candidates, highest, floor)) < half).nonzero().squeeze(1)
        if len(rest) > 0:
            bound[rest] = self._boundary(logits[rest], highest[rest], half[rest])
        return logits < bound[:, None]

    def _boundary(self, logits: Tensor, highest: Tensor, half: Tensor) -> Tensor:
        """Return the lowest logit [n] above which lies less than `half` [n] of the mass, by bisection over its bits."""
        low, high = _ordered_bits(torch.full_like(highest, -torch.inf)), _ordered_bits(highest)
        for _ in range(8 * logits.itemsize):  # half of the mass or more lies above `low`, less above `high`
            middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
            is_low = self.sum(_mass_above(logits, highest, _from_ordered_bits(middle))) >= half
            low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
        return _from_ordered_bits(high)

    def normalize_(self, *values: Tensor) -> Tensor:
        """Replace each tensor [n, width] by its log-softmax over the vocabulary of all ranks, in place.

        Returns the log-sum-exps, stacked [len(values), n]. Needs two all_reduces and one temporary [n, width].
        """
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
        """Return values and ids of the candidates of all ranks, at most `most` of each rank: [n, ranks * most]. float64
        represents both exactly."""
        tokens, width = values.shape
        candidates = torch.full((2, tokens, most), -torch.inf, dtype=torch.float64, device=values.device)
        candidates[1] = _NO_ID
        candidates[0, :, :width], candidates[1, :, :width] = values, ids
        gathered = [torch.empty_like(candidates) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(gathered, candidates, group=self.group)
        values, wide_ids = torch.cat(gathered, dim=-1)
        return values, wide_ids.long()


def _highest(values: Tensor) -> Tensor:
    return values.amax(-1) if values.shape[1] else values.new_full(values.shape[:1], -torch.inf)


@fused
def _mass_above(logits: Tensor, highest: Tensor, bound: Tensor) -> Tensor:
    """Return the sum [n] in float64 of exp(logit - highest) over the logits [n, width] above `bound` [n]."""
    mass = (logits - highest[:, None]).exp()
    return torch.where(logits > bound[:, None], mass, 0.0).sum(-1, dtype=torch.float64)


def _ordered_bits(values: Tensor) -> Tensor:
    """Return integers of the size of the floats in `values` and in the same order. No float lies between neighbours."""
    bits = values.view(torch.int32 if values.itemsize == 4 else torch.int64)
    return bits ^ ((bits >> (8 * values.itemsize - 1)) & torch.iinfo(bits.dtype).max)


def _from_ordered_bits(keys: Tensor) -> Tensor:
    """Invert `_ordered_bits`."""
    bits = keys ^ ((keys >> (8 * keys.itemsize - 1)) & torch.iinfo(keys.dtype).max)
    return bits.view(torch.float32 if keys.itemsize == 4 else torch.float64)


def _top_columns(logits: Tensor, k: int) -> Tensor:
    """Return the columns [n, k] of the k highest logits of each row, in any order; among equals the lower columns.

    torch.topk chooses any of several equal logits, and bf16 logits often tie at the k-th place: the choice would depend
    on the number of ranks. A row with such a tie takes the strictly higher columns and the lowest of the tied columns.
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
