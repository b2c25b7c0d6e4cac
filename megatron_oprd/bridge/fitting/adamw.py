"""The student's maps fitted with AdamW, as the paper does it; the closed form of `solve.py` is the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting.moments import Moments, float64_chunks
from megatron_oprd.bridge.fitting.solve import PairFit, TeacherDirections, describe
from megatron_oprd.types import LayerPair


def initial_map(rank: int, width: int, *seed_parts: int) -> torch.Tensor:
    """A map [rank, width] as `nn.Linear(width, rank, bias=False)` draws it (Kaiming uniform), float32: P_S before
    fitting. It depends on the seed parts alone, and a smaller rank has the first rows of a larger one."""
    bound = width**-0.5
    numbers = np.random.default_rng(seed_parts).uniform(-bound, bound, (rank, width))
    return torch.from_numpy(numbers).float()


class AdamWFit:
    """P_S of several layer pairs under AdamW without weight decay, float64 (OPRD eq. (13)).

    The loss is the mean over `num_pairs`, over a step's tokens and over the r numbers of (P_S x - P_T (y - mu_T))^2.
    AdamW updates each entry of a map from that entry's gradients alone, and a row's gradient does not depend on the
    other rows: the maps of the largest rank hold those of every smaller one as their first rows. Fitted on its own, a
    smaller rank r would have its gradients multiplied by (largest rank) / r, which AdamW's ratio of moments cancels up
    to its epsilon of 1e-8.
    """

    def __init__(
        self,
        teachers: Mapping[LayerPair, TeacherDirections],
        student_width: int,
        ranks: Sequence[int],
        *,
        lr: float,
        seed: int,
        num_pairs: int,
    ) -> None:
        """`teachers`: the directions of this process's pairs, as many as the largest of `ranks`; their device is where
        the fit runs. `num_pairs`: the pairs of all processes together."""
        self.ranks = tuple(ranks)
        self.num_pairs = num_pairs
        self.best: dict[LayerPair, dict[int, PairFit]] = {pair: {} for pair in teachers}
        self._teachers = dict(teachers)
        self._maps: dict[LayerPair, torch.Tensor] = {}
        self._sums: dict[LayerPair, torch.Tensor] = {}  # of half the gradient of the squared error over tokens
        self._tokens = dict.fromkeys(teachers, 0)
        for pair, teacher in teachers.items():
            start = initial_map(max(ranks), student_width, seed, pair.student, pair.teacher)
            self._maps[pair] = start.to(teacher.mean).requires_grad_()
            self._sums[pair] = torch.zeros_like(self._maps[pair], requires_grad=False)
        self._optimizer = torch.optim.AdamW(list(self._maps.values()), lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def add(self, pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Count the states [n, d_S] and [n, d_T] of n tokens, of any float dtype, towards the next step. The gradient
        of the squared error is (P_S x - z_T) x^T, so autograd keeps nothing. No communication."""
        directions, student_map = self._teachers[pair], self._maps[pair]
        for x, y in float64_chunks(student, teacher):
            error = x @ student_map.T - (y - directions.mean) @ directions.directions[: len(student_map)].T
            self._sums[pair].addmm_(error.T, x)
        self._tokens[pair] += len(student)

    @torch.no_grad()
    def step(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """One update from the tokens that were added on the ranks of the groups since the last one. Collective over
        each group in turn. A pair without tokens stays as it is."""
        for pair, student_map in self._maps.items():
            tokens = torch.tensor(float(self._tokens[pair]), dtype=torch.float64, device=student_map.device)
            for group in groups:
                dist.all_reduce(self._sums[pair], group=group)
                dist.all_reduce(tokens, group=group)
            count = int(tokens)
            scale = 2.0 / (count * len(student_map) * self.num_pairs) if count else 0.0
            student_map.grad = self._sums[pair] * scale if count else None
        self._optimizer.step()
        for pair, total in self._sums.items():
            total.zero_()
            self._tokens[pair] = 0

    @torch.no_grad()
    def snapshot(self, held_out: Mapping[LayerPair, Moments]) -> dict[LayerPair, dict[int, float]]:
        """The error of each pair at each rank on its held-out moments; `best` keeps the maps that had the least so far.

        Each pair and rank has a best epoch of its own, since no two depend on each other; the paper keeps one epoch
        for all pairs of a rank. No communication.
        """
        errors: dict[LayerPair, dict[int, float]] = {}
        for pair, student_map in self._maps.items():
            best = self.best[pair]
            fits = {rank: describe(student_map[:rank], self._teachers[pair], held_out[pair]) for rank in self.ranks}
            best.update({r: fit for r, fit in fits.items() if r not in best or fit.error < best[r].error})
            errors[pair] = {rank: fit.error for rank, fit in fits.items()}
        return errors
