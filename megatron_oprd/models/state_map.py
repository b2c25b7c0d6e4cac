"""Trained maps from the student's hidden states to the teacher's width, and their backward. No communication."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch

from megatron_oprd.config import StateMapConfig
from megatron_oprd.models.projection import StudentMap

CHUNK_ROWS = 1024  # rows of hidden states whose inner activations exist at one time


class StateMap(Protocol):
    """A map of the student's hidden states that the loss compares with the teacher's."""

    @property
    def parameters(self) -> Mapping[str, torch.Tensor]:
        """Return the matrices of the map by name."""
        ...

    @property
    def gradients(self) -> Mapping[str, torch.Tensor]:
        """Return the sums of the gradients by the names of `parameters`; none if the map is not trained."""
        ...

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Map states [tokens, d_S] to [tokens, width], in float32 at least."""
        ...

    def pull_back(self, gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the gradient of `states` [tokens, d_S] from that of the result [tokens, width], and add the gradients
        of the matrices to `gradients`."""
        ...


class MlpMap:
    """M(h) = W2 GELU(W1 h) with the exact GELU and without biases, trained.

    Inner activations [rows, inner width] are computed chunk by chunk of rows, and again in `pull_back`.
    """

    def __init__(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.parameters = {"first": first, "second": second}  # W1 [inner, d_S], W2 [width, inner]
        self.gradients = {name: torch.zeros_like(weight) for name, weight in self.parameters.items()}

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        first, second = self.parameters.values()
        parts = [torch.nn.functional.gelu(part @ first.t()) @ second.t() for part in _chunks(states, first.dtype)]
        return torch.cat(parts)

    def pull_back(self, gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        first, second = self.parameters.values()
        results = []
        for part, of_result in zip(_chunks(states, first.dtype), gradient.split(CHUNK_ROWS), strict=True):
            inner = part @ first.t()
            normal = torch.special.ndtr(inner)  # GELU(x) = x ndtr(x)
            self.gradients["second"].addmm_(of_result.t(), inner * normal)
            slope = normal + inner * torch.exp(-0.5 * inner.square()) / math.sqrt(2 * math.pi)
            of_inner = (of_result @ second).mul_(slope)
            self.gradients["first"].addmm_(of_inner.t(), part)
            results.append(of_inner @ first)
        return torch.cat(results).to(states.dtype)


def make_maps(
    config: StateMapConfig, layers: Iterable[int], widths: tuple[int, int], seed: int, device: torch.device
) -> dict[int, StateMap]:
    """Return a map with random matrices for each student layer, the same on all ranks and in every layout.

    Elements are uniform between +-1 / sqrt(input width), as torch initialises a linear layer. `init: closed_form`
    replaces them in the first step (`bridge/fitting/map_start.py`).

    Args:
        widths: hidden sizes of student and teacher.
    """
    of_student, of_teacher = widths
    inner = config.hidden_multiple * of_student

    def make(layer: int) -> StateMap:
        generator = torch.Generator().manual_seed(1_000_003 * seed + layer)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            values = torch.empty(rows, columns).uniform_(-1, 1, generator=generator)
            return values.mul_(columns**-0.5).to(device)

        if config.kind == "linear":
            return StudentMap(matrix(of_teacher, of_student), trained=True)
        return MlpMap(matrix(inner, of_student), matrix(of_teacher, inner))

    return {layer: make(layer) for layer in layers}


def _chunks(states: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    return list(states.to(dtype).split(CHUNK_ROWS))
