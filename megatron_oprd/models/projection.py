"""The two projections of a bridge between models of different width (OPRD eq. (12)-(14)): r numbers per token."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_oprd.types import LayerPair, PairBridge


@dataclass(frozen=True)
class TeacherMap:
    """The projection of a teacher layer, z_T = P_T (h_T - mu_T), in float32 at least. No communication."""

    weight: torch.Tensor  # P_T [r, d_T]
    mean: torch.Tensor  # mu_T [d_T]

    @property
    def rank(self) -> int:
        return len(self.weight)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Project states [tokens, d_T] to [tokens, r]."""
        return (_wide(states) - self.mean) @ self.weight.t()


class StudentMap:
    """The projection of a student layer, z_S = P_S h_S, in float32 at least, and its backward. No communication.

    `gradient` [r, d_S] accumulates the gradient of P_S; it is None if P_S is not trained.
    """

    def __init__(self, weight: torch.Tensor, *, trained: bool) -> None:
        self.weight = weight  # P_S [r, d_S]
        self.gradient = torch.zeros_like(weight) if trained else None

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """Return the matrices of the map by name."""
        return {"map": self.weight}

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        """Return the gradients by the names of `parameters`; none if the map is not trained."""
        return {} if self.gradient is None else {"map": self.gradient}

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Project states [tokens, d_S] to [tokens, r]."""
        return _wide(states) @ self.weight.t()

    def pull_back(self, gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Return the gradient of `states` [tokens, d_S], in their dtype, from the gradient of z_S [tokens, r]. Add the
        gradient of P_S to `self.gradient`."""
        if self.gradient is not None:
            self.gradient.addmm_(gradient.t(), _wide(states))
        return (gradient @ self.weight).to(states.dtype)


def teacher_maps(bridge: Mapping[LayerPair, PairBridge], device: torch.device) -> dict[int, TeacherMap]:
    """Return the projections {teacher layer: TeacherMap}. Pairs with the same teacher layer share one projection."""
    return {
        pair.teacher: TeacherMap(maps.teacher_map.to(device), maps.teacher_mean.to(device))
        for pair, maps in bridge.items()
    }


def student_maps(
    bridge: Mapping[LayerPair, PairBridge], device: torch.device, *, trained: bool
) -> dict[int, StudentMap]:
    """Return the projections {student layer: StudentMap}, as copies that training may change."""
    return {
        pair.student: StudentMap(maps.student_map.to(device, copy=True), trained=trained)
        for pair, maps in bridge.items()
    }


def identify(bridge: Mapping[LayerPair, PairBridge]) -> str:
    """Return the SHA-256 digest of all projections, written `sha256:` and 64 hexadecimal digits."""
    total = hashlib.sha256()
    for pair, maps in sorted(bridge.items(), key=lambda item: (item[0].student, item[0].teacher)):
        total.update(f"{pair.student} {pair.teacher}\n".encode())
        for tensor in (maps.student_map, maps.teacher_map, maps.teacher_mean):
            total.update(tensor.contiguous().numpy().tobytes())
    return f"sha256:{total.hexdigest()}"


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
