"""Fit the student's maps with AdamW, as in the paper. The closed form of `solve.py` is the default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting.moments import Moments, float64_chunks
from megatron_oprd.bridge.fitting.solve import PairFit, TeacherDirections, describe
from megatron_oprd.types import LayerPair


def initial_map(rank: int, width: int, *seed_parts: int) -> torch.Tensor:
    """Return P_S before fitting: a random map [rank, width], float32, distributed as in `nn.Linear` (Kaiming uniform).

    The map depends on the seed parts only. A smaller rank has the first rows of a larger one.
    """
    bound = width**-0.5
    numbers = np.random.default_rng(seed_parts).uniform(-bound, bound, (rank, width))
    return torch.from_numpy(numbers).float()


class AdamWFit:
    """Fit P_S of several layer pairs with AdamW without weight decay, in float64 (OPRD eq. (13)).

    The loss is the mean of (P_S x - P_T (y - mu_T))^2 over `num_pairs`, over the tokens of a step and over the r rows.

    One fit of the largest rank contains the fits of all smaller ranks as its first rows: AdamW updates each entry from
    the gradients of that entry alone, and the gradient of a row does not depend on other rows. A separate fit of rank r
    has gradients that are larger by (largest rank) / r. AdamW cancels this factor, except for its epsilon of 1e-8.
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
        """Start from the random initial maps, on the device of the teacher's directions.

        Args:
            teachers: at least max(ranks) directions for each layer pair of this process.
            num_pairs: number of layer pairs of all processes.
        """
        self.ranks = tuple(ranks)
        self.num_pairs = num_pairs
        self.best: dict[LayerPair, dict[int, PairFit]] = {pair: {} for pair in teachers}
        self._teachers = dict(teachers)
        self._maps: dict[LayerPair, torch.Tensor] = {}
        self._sums: dict[LayerPair, torch.Tensor] = {}  # half the gradient of the squared error, summed over tokens
        self._tokens = dict.fromkeys(teachers, 0)
        for pair, teacher in teachers.items():
            start = initial_map(max(ranks), student_width, seed, pair.student, pair.teacher)
            self._maps[pair] = start.to(teacher.mean).requires_grad_()
            self._sums[pair] = torch.zeros_like(self._maps[pair], requires_grad=False)
        self._optimizer = torch.optim.AdamW(list(self._maps.values()), lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def add(self, pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add the gradient of n tokens to the next step, from states [n, d_S] and [n, d_T] of any float dtype.

        Half the gradient of the squared error is (P_S x - z_T) x^T, so autograd is not needed. No communication.
        """
        directions, student_map = self._teachers[pair], self._maps[pair]
        for x, y in float64_chunks(student, teacher):
            error = x @ student_map.T - (y - directions.mean) @ directions.directions[: len(student_map)].T
            self._sums[pair].addmm_(error.T, x)
        self._tokens[pair] += len(student)

    @torch.no_grad()
    def step(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Update the maps from the tokens that all ranks added since the last step. A pair without tokens is unchanged.

        Communicates over: each of `groups` in turn.
        """
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
        """Return the held-out error of each pair and rank, and store the maps with the least error so far in `best`.

        Each pair and rank has its own best epoch, since their fits are independent. The paper uses one epoch for all
        pairs of a rank. No communication.
        """
        errors: dict[LayerPair, dict[int, float]] = {}
        for pair, student_map in self._maps.items():
            best = self.best[pair]
            fits = {rank: describe(student_map[:rank], self._teachers[pair], held_out[pair]) for rank in self.ranks}
            best.update({r: fit for r, fit in fits.items() if r not in best or fit.error < best[r].error})
            errors[pair] = {rank: fit.error for rank, fit in fits.items()}
        return errors
