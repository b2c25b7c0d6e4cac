"""The distance between hidden states, per token (OPRD eq. (6)), and its gradient in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_EPSILON = 1e-12


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of each token at one layer, [tokens] in float32 (float64 for float64 states), detached."""

    error: torch.Tensor  # e[l, t] of OPRD eq. (6), from the states after `normalize`
    cosine: torch.Tensor
    student_norm: torch.Tensor
    teacher_norm: torch.Tensor


def token_statistics(student: torch.Tensor, teacher: torch.Tensor, normalize: str) -> TokenStatistics:
    """Return the statistics of each token, with error e[t] = ||f(student[t]) - f(teacher[t])||^2 / hidden.

    f is the identity (normalize="none") or divides each state by its norm ("l2"). Computed in float32 at least.
    Identical inputs give exactly zero. No communication.

    Args:
        student, teacher: [tokens, hidden].
    """
    student, teacher = _wide(student), _wide(teacher)
    student_norm, teacher_norm = student.norm(dim=-1), teacher.norm(dim=-1)
    cosine = (student * teacher).sum(-1) / (student_norm * teacher_norm).clamp_min(_EPSILON)
    difference = _normalized(student, normalize) - _normalized(teacher, normalize)
    error = difference.pow(2).sum(-1) / student.shape[-1]
    return TokenStatistics(error, cosine, student_norm, teacher_norm)


def weighted_gradient(
    student: torch.Tensor, teacher: torch.Tensor, normalize: str, weights: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of sum_t weights[t] * e[t] with respect to the student's states, in their dtype.

    The closed form needs no autograd graph and no second copy of the states between forward and backward.
    No communication.

    Args:
        student, teacher: [tokens, hidden].
        weights: [tokens].
    """
    wide_student, wide_teacher = _wide(student), _wide(teacher)
    scale = (2.0 / student.shape[-1]) * weights.to(wide_student.dtype)[:, None]
    unit = _normalized(wide_student, normalize)
    gradient = unit - _normalized(wide_teacher, normalize)
    if normalize == "l2":
        norm = wide_student.norm(dim=-1, keepdim=True)
        # d(unit)/d(student) projects out the radial part; a clamped norm is a constant and has no such part.
        radial = (gradient * unit).sum(-1, keepdim=True) * (norm > _EPSILON)
        gradient = (gradient - radial * unit) / norm.clamp_min(_EPSILON)
    return (scale * gradient).to(student.dtype)


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.detach().to(torch.promote_types(states.dtype, torch.float32))


def _normalized(states: torch.Tensor, normalize: str) -> torch.Tensor:
    if normalize == "none":
        return states
    return states / states.norm(dim=-1, keepdim=True).clamp_min(_EPSILON)
