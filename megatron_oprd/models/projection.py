"""Both sides of a bridge between unlike models: r numbers take the place of a hidden state (OPRD eq. (12)-(14))."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from megatron_oprd.types import LayerPair, PairBridge


@dataclass(frozen=True)
class TeacherMap:
    """The teacher's side of a layer: z_T = P_T (h_T - mu_T), in float32 at least. No communication."""

    weight: torch.Tensor  # P_T [r, d_T]
    mean: torch.Tensor  # mu_T [d_T]

    @property
    def rank(self) -> int:
        return len(self.weight)

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, d_T] -> [tokens, r]."""
        return (_wide(states) - self.mean) @ self.weight.t()


class StudentMap:
    """The student's side of a layer: z_S = P_S h_S, in float32 at least, and the way back for gradients.

    `gradient` [r, d_S] gathers that of P_S where it is trained; else it stays None. No communication.
    """

    def __init__(self, weight: torch.Tensor, *, trained: bool) -> None:
        self.weight = weight  # P_S [r, d_S]
        self.gradient = torch.zeros_like(weight) if trained else None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, d_S] -> [tokens, r]."""
        return _wide(states) @ self.weight.t()

    def pull_back(self, gradient: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """The gradient for z_S [tokens, r] as one for `states` [tokens, d_S], in their dtype; that for P_S is added to
        `gradient`."""
        if self.gradient is not None:
            self.gradient.addmm_(gradient.t(), _wide(states))
        return (gradient @ self.weight).to(states.dtype)


def teacher_maps(bridge: Mapping[LayerPair, PairBridge], device: torch.device) -> dict[int, TeacherMap]:
    """The teacher's side by teacher layer; pairs that share one have the same."""
    return {
        pair.teacher: TeacherMap(maps.teacher_map.to(device), maps.teacher_mean.to(device))
        for pair, maps in bridge.items()
    }


def student_maps(
    bridge: Mapping[LayerPair, PairBridge], device: torch.device, *, trained: bool
) -> dict[int, StudentMap]:
    """The student's side by student layer, copies that may be changed."""
    return {
        pair.student: StudentMap(maps.student_map.to(device, copy=True), trained=trained)
        for pair, maps in bridge.items()
    }


def identify(bridge: Mapping[LayerPair, PairBridge]) -> str:
    """`sha256:` and 64 hexadecimal digits that change with any number of the maps."""
    total = hashlib.sha256()
    for pair, maps in sorted(bridge.items(), key=lambda item: (item[0].student, item[0].teacher)):
        total.update(f"{pair.student} {pair.teacher}\n".encode())
        for tensor in (maps.student_map, maps.teacher_map, maps.teacher_mean):
            total.update(tensor.contiguous().numpy().tobytes())
    return f"sha256:{total.hexdigest()}"


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))
