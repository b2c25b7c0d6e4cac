"""The subspace cosine of fitted maps on held-out tokens, beside that of maps that nobody fitted."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_oprd.bridge.fitting.adamw import initial_map
from megatron_oprd.bridge.fitting.solve import PairFit
from megatron_oprd.models.projection import StudentMap, TeacherMap
from megatron_oprd.types import LayerPair


class SubspaceCosines:
    """Sums of cos(z_S, z_T) over tokens, for each pair on this rank and each rank of a bridge (the paper's Fig. 12)."""

    def __init__(self, fits: Mapping[LayerPair, Mapping[int, PairFit]], seed: int, device: torch.device) -> None:
        self._maps: dict[LayerPair, dict[int, tuple[TeacherMap, StudentMap, StudentMap]]] = {}
        for pair, by_rank in fits.items():
            for rank, fit in by_rank.items():
                bridge = fit.bridge
                before = initial_map(rank, bridge.student_map.shape[1], seed, pair.student, pair.teacher)
                students = (StudentMap(one.to(device), trained=False) for one in (before, bridge.student_map))
                teacher = TeacherMap(bridge.teacher_map.to(device), bridge.teacher_mean.to(device))
                self._maps.setdefault(pair, {})[rank] = (teacher, *students)
        self._sums = {
            pair: torch.zeros(len(by_rank), 2, dtype=torch.float64, device=device) for pair, by_rank in fits.items()
        }
        self._tokens = {pair: torch.zeros((), dtype=torch.float64, device=device) for pair in fits}

    def visit(self, pair: LayerPair, student: torch.Tensor, teacher: torch.Tensor, held_out: torch.Tensor) -> None:
        """Count the held-out ones of the states [tokens, d_S] and [tokens, d_T] of a pair."""
        student, teacher = student[held_out], teacher[held_out]
        self._tokens[pair] += len(student)
        for number, (teacher_map, *students) in enumerate(self._maps[pair].values()):
            target = teacher_map(teacher)
            for place, student_map in enumerate(students):
                cosine = torch.nn.functional.cosine_similarity(student_map(student), target, dim=-1, eps=1e-12)
                self._sums[pair][number, place] += cosine.double().sum()

    def means(self, groups: list[dist.ProcessGroup]) -> dict[LayerPair, dict[int, tuple[float, float]]]:
        """(before, after) fitting of each pair and rank, over the tokens of all ranks of the groups. Collective over
        them; once."""
        means: dict[LayerPair, dict[int, tuple[float, float]]] = {}
        for pair, sums in self._sums.items():
            for group in groups:
                dist.all_reduce(sums, group=group)
                dist.all_reduce(self._tokens[pair], group=group)
            rows = (sums / self._tokens[pair].clamp_min(1)).tolist()
            means[pair] = {rank: (row[0], row[1]) for rank, row in zip(self._maps[pair], rows, strict=True)}
        return means
