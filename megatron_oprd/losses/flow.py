"""Hidden flow: how a model's hidden states turn from position to position of a response (PHF, arXiv 2606.29340).

A sequence has m positions w_1 < ... < w_m. At layer l the direction i is u[l, i] = D / ||D|| with
D = h[l, w_(i+1)] - h[l, w_i], and U[l] is the matrix of the m - 1 directions. Student S and teacher T are compared by

    direction(l)  1/(m-1) sum_i ||u_S[l, i] - u_T[l, i]||^2 / 2              (1 - cosine)
    geometry(l)   ||U_S[l] U_S[l]^T - U_T[l] U_T[l]^T||^2 / (m-1)^2          (Frobenius norm)
    adjacent(l)   ||U_S[l-1] U_S[l]^T - U_T[l-1] U_T[l]^T||^2 / (m-1)^2

Identical models give exactly 0. All functions are batched over sequences and need no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_EPSILON = 1e-12


def spread_positions(response_mask: Sequence[int], most: int) -> list[int]:
    """Return at most `most` indices of sampled response tokens, spread evenly from the first to the last one.

    With n sampled tokens and m = min(n, most), position i of 0, ..., m - 1 is token floor(i (n - 1) / (m - 1)). Fewer
    than two sampled tokens have no direction: then the list is empty.
    """
    sampled = [index for index, flag in enumerate(response_mask) if flag]
    count = min(len(sampled), most)
    if count < 2:
        return []
    return [sampled[place * (len(sampled) - 1) // (count - 1)] for place in range(count)]


@dataclass(frozen=True)
class Directions:
    """The directions of one layer, in float32 at least."""

    units: torch.Tensor  # [sequences, m - 1, hidden]; 0 between two equal states, and where a shorter sequence has none
    lengths: torch.Tensor  # [sequences, m - 1, 1]: ||D||

    def pull_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the states [sequences, m, hidden] from that of the units.

        Two equal states have no direction and get no gradient.
        """
        radial = (gradient * self.units).sum(-1, keepdim=True)
        steps = (gradient - radial * self.units) / self.lengths.clamp_min(_EPSILON) * (self.lengths > _EPSILON)
        states = steps.new_zeros(steps.shape[0], steps.shape[1] + 1, steps.shape[2])
        states[:, 1:] += steps
        states[:, :-1] -= steps
        return states


def directions(states: torch.Tensor) -> Directions:
    """Return the directions between neighbouring states [sequences, m, hidden]."""
    steps = states.to(torch.promote_types(states.dtype, torch.float32)).diff(dim=1)
    lengths = steps.norm(dim=-1, keepdim=True)
    return Directions(steps / lengths.clamp_min(_EPSILON) * (lengths > _EPSILON), lengths)


def direction_error(student: Directions, teacher: Directions) -> torch.Tensor:
    """Return the sum of direction(l) over i [sequences], before the division by m - 1."""
    return (student.units - teacher.units).pow(2).sum((-1, -2)) / 2


def direction_gradient(student: Directions, teacher: Directions) -> torch.Tensor:
    """Return the gradient of `direction_error` by the student's units."""
    return student.units - teacher.units


@dataclass(frozen=True)
class Cosines:
    """The cosines between the directions of two layers, or of one layer, of one model."""

    first: torch.Tensor  # [sequences, m - 1, hidden], units
    second: torch.Tensor

    def matrix(self) -> torch.Tensor:
        """Return U U'^T [sequences, m - 1, m - 1]."""
        return self.first @ self.second.mT


def cosine_error(student: Cosines, teacher: Cosines) -> torch.Tensor:
    """Return the squared Frobenius norm [sequences] of the difference, before the division by (m - 1)^2."""
    return (student.matrix() - teacher.matrix()).pow(2).sum((-1, -2))


def cosine_gradients(student: Cosines, teacher: Cosines) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `cosine_error` by `student.first` and `student.second`.

    Within one layer (geometry) the gradient is the sum of both.
    """
    difference = student.matrix() - teacher.matrix()
    return 2 * difference @ student.second, 2 * difference.mT @ student.first
