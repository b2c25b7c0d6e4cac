"""Measure the subspace cosine on held-out tokens, with fitted and with random initial maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting.adamw import initial_map
from megatron_oprd.bridge.fitting.solve import PairFit
from megatron_oprd.models.projection import StudentMap, TeacherMap
from megatron_oprd.types import LayerPair


class SubspaceCosines:
    """Means of cos(z_S, z_T) over tokens, for each layer pair on this rank and each rank of a bridge (OPRD Fig. 12)."""

    def __init__(self, fits: Mapping[LayerPair, Mapping[int, PairFit]], seed: int, device: torch.device) -> None:
        self._maps: dict[LayerPair, dict[int, tuple[TeacherMap, StudentMap, StudentMap]]] = {}
        for pair, by_rank in fits.items():
            for rank, fit in by_rank.items():
                bridge = fit.bridge
                before = initial_map(rank, bridge.student_map.shape[1], seed, pair.student, pair.teacher)
                student_maps = (StudentMap(m.to(device), trained=False) for m in (before, bridge.student_map))
                teacher = TeacherMap(bridge.teacher_map.to(device), bridge.teacher_mean.to(device))
                self._maps.setdefault(pair, {})[rank] = (teacher, *student_maps)
        self._sums = {
            pair: torch.zeros(len(by_rank), 2, dtype=torch.float64, device=device) for pair, by_rank in fits.items()
        }
        self._tokens = {pair: torch.zeros((), dtype=torch.float64, device=device) for pair in fits}

    def add(self, pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor, held_out: torch.Tensor) -> None:
        """Add the held-out states of a pair, from states [tokens, d_S] and [tokens, d_T]. No communication.

        Args:
            held_out: [tokens] bool.
        """
        student, teacher = student[held_out], teacher[held_out]
        self._tokens[pair] += len(student)
        for row, (teacher_map, *student_maps) in enumerate(self._maps[pair].values()):
            target = teacher_map(teacher)
            for column, student_map in enumerate(student_maps):
                cosine = torch.nn.functional.cosine_similarity(student_map(student), target, dim=-1, eps=1e-12)
                self._sums[pair][row, column] += cosine.double().sum()

    def means(self, groups: list[dist.ProcessGroup]) -> dict[LayerPair, dict[int, tuple[float, float]]]:
        """Return the mean cosines (before, after) of each pair and rank, 0 without tokens. Call it only once.

        Communicates over: `groups`, in turn.
        """
        means: dict[LayerPair, dict[int, tuple[float, float]]] = {}
        for pair, sums in self._sums.items():
            for group in groups:
                dist.all_reduce(sums, group=group)
                dist.all_reduce(self._tokens[pair], group=group)
            rows = (sums / self._tokens[pair].clamp_min(1)).tolist()
            means[pair] = {rank: (row[0], row[1]) for rank, row in zip(self._maps[pair], rows, strict=True)}
        return means
