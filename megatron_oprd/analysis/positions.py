"""Cosine and error of the hidden states by layer and by position in the response."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_oprd.analysis.states import ComparedModels, LayerStates
from megatron_oprd.losses.representation import token_statistics
from megatron_oprd.parallel.collectives import sum_over
from megatron_oprd.training.global_batch import GlobalBatch

MOST_BINS = 16
# Sums over tokens. `error` is e[l, t] of OPRD eq. (6) without normalisation.
SUMS = ("cosine", "error", "teacher_square")


class PositionSums:
    """Sums of cosine and error by layer and by bin of positions, for each state of the student.

    Args:
        models: the compared models.
        states: the names of the student's states.
        longest: the largest position in a response, from 0, that any batch compares.
    """

    def __init__(self, models: ComparedModels, states: Sequence[str], longest: int) -> None:
        self.models = models
        self.layers = [pair.student for pair in models.plan.pairs]
        self.width = -(-(longest + 1) // MOST_BINS)  # positions of a bin
        self.num_bins = -(-(longest + 1) // self.width)
        shape = (len(self.layers), self.num_bins, len(SUMS))
        device = models.topology.device
        self.sums = {name: torch.zeros(shape, dtype=torch.float64, device=device) for name in states}
        self.tokens = torch.zeros(self.num_bins, dtype=torch.float64)  # over all ranks
        self._bins = torch.zeros(0, dtype=torch.int64)

    def start(self, global_batch: GlobalBatch) -> None:
        """Use the positions of this global batch for the states that follow. Call it on every rank."""
        positions = [position for of_rollout in global_batch.representation.positions for position in of_rollout]
        bins = torch.tensor(positions, dtype=torch.int64) // self.width
        self.tokens += torch.bincount(bins, minlength=self.num_bins)
        self._bins = bins.to(self.models.topology.device)

    def add(self, states: LayerStates) -> None:
        """Add the states of a layer pair. No communication."""
        row, bins = self.layers.index(states.pair.student), self._bins[states.token_numbers]
        for name, student in states.students.items():
            statistics = token_statistics(student, states.teacher, "none")
            values = torch.stack([statistics.cosine, statistics.error, statistics.teacher_norm.pow(2)], dim=-1)
            self.sums[name][row].index_add_(0, bins, values.double())

    def means(self) -> dict[str, Any]:
        """Return the means over tokens as the content of analysis.json. Call it once.

        Communicates over: the ranks with other tokens, and the pipeline-parallel group.
        """
        topology = self.models.topology
        found: dict[str, Any] = {
            "first_positions": [number * self.width for number in range(self.num_bins)],
            "tokens": self.tokens.int().tolist(),
        }
        for name, local in self.sums.items():
            values: list[float] = local.flatten().tolist()
            for group in (*topology.token_groups, topology.groups.pp):
                values = sum_over(values, group, topology.device)
            sums = torch.tensor(values, dtype=torch.float64).view(local.shape)
            found[name] = [
                {"layer": layer, **_layer_means(of_layer, self.tokens, self.models.width(layer))}
                for layer, of_layer in zip(self.layers, sums, strict=True)
            ]
        return found


def _layer_means(sums: torch.Tensor, tokens: torch.Tensor, dimensions: int) -> dict[str, Any]:
    """Return the means of a layer from its sums [bins, SUMS]: over all tokens, and by bin (None without tokens)."""
    total, count = sums.sum(0), float(tokens.sum())
    by_bin = (sums / tokens[:, None]).tolist()
    filled = [number > 0 for number in tokens.tolist()]
    cosine, error, teacher_square = (total / count).tolist()
    return {
        "cosine": cosine,
        "error": error,
        # ||h_S - h_T|| / ||h_T||, both as root mean squares over the tokens
        "relative_error": (dimensions * error / teacher_square) ** 0.5 if teacher_square else None,
        "cosine_by_position": [one[0] if has else None for one, has in zip(by_bin, filled, strict=True)],
        "error_by_position": [one[1] if has else None for one, has in zip(by_bin, filled, strict=True)],
    }
