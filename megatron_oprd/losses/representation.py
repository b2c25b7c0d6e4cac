"""The distance between hidden states, per token (OPRD eq. (6)), and its gradient in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_EPSILON = 1e-12


@dataclass(frozen=True)
class TokenStatistics:
    """Per token, each [tokens] in float32 (float64 for float64 states), detached."""

    error: torch.Tensor  # e[l, t], of the states after `normalize`
    cosine: torch.Tensor
    student_norm: torch.Tensor
    teacher_norm: torch.Tensor


def error_and_gradient(
    student: torch.Tensor, teacher: torch.Tensor, normalize: str, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, TokenStatistics]:
    """sum_t weights[t] * e[t] (float64 scalar), its gradient [tokens, hidden] in the student's dtype, and statistics.

    e[t] = ||f(student[t]) - f(teacher[t])||^2 / hidden with f the identity (`none`) or the L2-normalisation (`l2`).
    student, teacher: [tokens, hidden]; weights: [tokens]. Computed in float32 at least. The gradient is written out
    rather than left to autograd: no graph and no second copy of the states is kept. No communication.
    Identical inputs give exactly zero for both.
    """
    student_dtype = student.dtype
    wide = torch.promote_types(student_dtype, torch.float32)
    student, teacher = student.detach().to(wide), teacher.detach().to(wide)
    student_norm, teacher_norm = student.norm(dim=-1), teacher.norm(dim=-1)
    hidden = student.shape[-1]
    scale = (2.0 / hidden) * weights.to(wide)
    cosine = (student * teacher).sum(-1) / (student_norm * teacher_norm).clamp_min(_EPSILON)
    if normalize == "l2":
        length = student_norm.clamp_min(_EPSILON)[:, None]
        unit = student / length
        difference = unit - teacher / teacher_norm.clamp_min(_EPSILON)[:, None]
        # d(unit)/d(student) projects out the radial part; a clamped length is a constant and has no such part.
        radial = (difference * unit).sum(-1, keepdim=True) * (student_norm > _EPSILON)[:, None]
        gradient = (difference - radial * unit) / length
    else:
        difference = student - teacher
        gradient = difference
    error = difference.pow(2).sum(-1) / hidden
    value = (weights.double() * error.double()).sum()
    statistics = TokenStatistics(error, cosine, student_norm, teacher_norm)
    return value, (scale[:, None] * gradient).to(student_dtype), statistics
