"""The directions of the differences between the student's and the teacher's states, and of the student's drift.

The difference is h_S - h_T; the drift is what training changed, h_S after - h_S before. Second moments are not centred,
because the loss (OPRD eq. (6)) is not: the eigenvalues of a layer add up to its mean squared difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.analysis.states import ComparedModels, LayerStates
from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.parallel.collectives import gather_objects

NUM_DIRECTIONS = 16  # leading directions of the difference that are listed one by one
NUM_COORDINATES = 5


class DifferenceMoments:
    """Second moments of the differences before and after training, by layer pair on this rank.

    Memory: three matrices [d, d] in float64 for each layer pair on this rank.
    """

    def __init__(self, models: ComparedModels) -> None:
        self.models = models
        self._moments: dict[int, Moments] = {}

    def add(self, states: LayerStates) -> None:
        """Add the states of a layer pair. Without a state before training, both differences are that of now.

        No communication.
        """
        teacher = states.teacher.double()
        after = states.students["after"].double() - teacher
        before = states.students["before"].double() - teacher if "before" in states.students else after
        layer = states.pair.student
        if layer not in self._moments:
            self._moments[layer] = Moments.empty(before.shape[1], after.shape[1], before.device)
        self._moments[layer].add(before, after)

    def describe(self, *, has_before: bool) -> list[dict[str, Any]]:
        """Return the content of analysis.json, one dictionary for each compared layer. Call it once.

        Communicates over: the ranks with other tokens, then the world.
        """
        topology, local = self.models.topology, {}
        share = topology.replica_rank * topology.tensor_size + topology.tensor_rank
        for number, pair in enumerate(self.models.layer_pairs):
            moments = self._moments.get(pair.student)
            if moments is None:  # another rank has all tokens
                width = self.models.width(pair.student)
                moments = Moments.empty(width, width, topology.device)
            for group in topology.token_groups:
                moments.reduce(group)
            if number % (topology.num_replicas * topology.tensor_size) == share:
                local[pair.student] = describe_difference(moments, has_before=has_before)
        gathered: dict[int, dict[str, Any]] = {}
        for part in gather_objects(local, dist.group.WORLD):
            gathered |= part
        return [{"layer": layer, **gathered[layer]} for layer in sorted(gathered)]


def describe_difference(moments: Moments, *, has_before: bool) -> dict[str, Any]:
    """Return the rank curves of a layer, its leading directions and coordinates. No communication.

    Args:
        moments: of the difference before training (as the student) and after it (as the teacher).
        has_before: False if both are the same.
    """
    before = _uncentred(moments.student_scatter, moments.student_mean, moments.student_mean, moments.tokens)
    after = _uncentred(moments.teacher_scatter, moments.teacher_mean, moments.teacher_mean, moments.tokens)
    found: dict[str, Any] = {"after": _rank_curve(after, moments.teacher_mean)}
    first = after
    if has_before:
        first = before
        cross = _uncentred(moments.cross_scatter, moments.student_mean, moments.teacher_mean, moments.tokens)
        drift = before + after - cross - cross.T
        found["before"] = _rank_curve(before, moments.student_mean)
        found["drift"] = _rank_curve(drift, moments.teacher_mean - moments.student_mean)
        found["directions"] = _directions(before, after, drift)
    found["coordinates"] = _coordinates(first)
    return found


def _uncentred(scatter: torch.Tensor, left: torch.Tensor, right: torch.Tensor, tokens: int) -> torch.Tensor:
    return scatter / tokens + torch.outer(left, right)


def _rank_curve(second_moment: torch.Tensor, mean: torch.Tensor) -> dict[str, Any]:
    """Return the share of the mean square that the r leading directions explain, for r = 1, 2, 4, ... and d."""
    values = torch.linalg.eigvalsh(second_moment).flip(0).clamp(min=0.0)
    total = float(values.sum())
    if total == 0.0:
        return {"mean_square": 0.0, "ranks": [], "explained": [], "effective_rank": None, "mean_share": None}
    explained = (values.cumsum(0) / total).tolist()
    ranks = curve_ranks(len(values))
    return {
        "mean_square": total,
        "ranks": ranks,
        "explained": [explained[rank - 1] for rank in ranks],
        "effective_rank": float(values.sum() ** 2 / values.pow(2).sum()),  # the participation ratio
        "mean_share": float(mean.pow(2).sum()) / total,  # of a difference that all tokens have in common
    }


def curve_ranks(width: int) -> list[int]:
    """Return the ranks of a curve: the powers of two below the width, and the width."""
    return [*(2**power for power in range(width.bit_length()) if 2**power < width), width]


def _directions(before: torch.Tensor, after: torch.Tensor, drift: torch.Tensor) -> list[dict[str, float]]:
    """Return the leading directions of the difference before training: the difference that is left, and the drift.

    `share` is the part of the mean square of the difference before; `left` the mean square after over that before;
    `drift_share` the part of the drift's mean square in the direction.
    """
    _, vectors = torch.linalg.eigh(before)
    leading = vectors.flip(1)[:, :NUM_DIRECTIONS].T
    along = [(leading @ matrix * leading).sum(1).tolist() for matrix in (before, after, drift)]
    totals = [float(matrix.trace()) for matrix in (before, after, drift)]
    return [
        {
            "share": of_before / totals[0] if totals[0] else 0.0,
            "left": of_after / of_before if of_before else 0.0,
            "drift_share": of_drift / totals[2] if totals[2] else 0.0,
        }
        for of_before, of_after, of_drift in zip(*along, strict=True)
    ]


def _coordinates(second_moment: torch.Tensor) -> list[dict[str, float]]:
    """Return the coordinates of the hidden state, from 0, with the largest part of the mean squared difference."""
    squares, total = second_moment.diagonal(), second_moment.trace()
    values, indices = squares.topk(min(NUM_COORDINATES, len(squares)))
    shares: Sequence[float] = (values / total).tolist() if total else [0.0] * len(values)
    return [{"coordinate": index, "share": share} for index, share in zip(indices.tolist(), shares, strict=True)]
