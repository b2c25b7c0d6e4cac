"""Compute the first and second moments of the states of a layer pair, from which the closed form fits a bridge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist

_CHUNK_TOKENS = 2048  # tokens that are copied to float64 at a time


@dataclass
class Moments:
    """Count, means and centred second moments of n pairs of states (student x, teacher y), float64.

    The second moments are sums of centred products, corrected when the means change (Chan, Golub and LeVeque 1983). A
    difference of two large sums would lose digits: states of trained models have large means.
    """

    tokens: int  # n
    student_mean: torch.Tensor  # [d_S]
    teacher_mean: torch.Tensor  # [d_T]
    student_scatter: torch.Tensor  # [d_S, d_S] sum of (x - mean) (x - mean)^T
    teacher_scatter: torch.Tensor  # [d_T, d_T] sum of (y - mean) (y - mean)^T
    cross_scatter: torch.Tensor  # [d_S, d_T] sum of (x - mean) (y - mean)^T

    @classmethod
    def empty(cls, student_width: int, teacher_width: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of zero tokens."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            0,
            zeros(student_width),
            zeros(teacher_width),
            zeros(student_width, student_width),
            zeros(teacher_width, teacher_width),
            zeros(student_width, teacher_width),
        )

    @torch.no_grad()
    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Add the states [n, d_S] and [n, d_T] of the same n tokens, of any float dtype. No communication."""
        for x, y in float64_chunks(student, teacher):
            student_mean, teacher_mean = x.mean(dim=0), y.mean(dim=0)
            x, y = x - student_mean, y - teacher_mean
            self.student_scatter.addmm_(x.T, x)
            self.teacher_scatter.addmm_(y.T, y)
            self.cross_scatter.addmm_(x.T, y)
            self._join_means(len(x), student_mean, teacher_mean)

    def merge(self, other: Moments) -> None:
        """Add the tokens of `other`, which does not change. No communication."""
        self.student_scatter += other.student_scatter
        self.teacher_scatter += other.teacher_scatter
        self.cross_scatter += other.cross_scatter
        self._join_means(other.tokens, other.student_mean, other.teacher_mean)

    def reduce(self, group: dist.ProcessGroup) -> None:
        """Replace these moments by the moments of the tokens of all ranks, equal on every rank.

        A second call would count every token again. Communicates over: `group`.
        """
        own = torch.tensor([float(self.tokens)], dtype=torch.float64, device=self.student_mean.device)
        sums = torch.cat([own, self.tokens * self.student_mean, self.tokens * self.teacher_mean])
        dist.all_reduce(sums, group=group)
        total = int(sums[0])
        student_mean, teacher_mean = (sums[1:] / max(1, total)).split([len(self.student_mean), len(self.teacher_mean)])
        self._correct_scatters(student_mean - self.student_mean, teacher_mean - self.teacher_mean, self.tokens)
        for scatter in (self.student_scatter, self.teacher_scatter, self.cross_scatter):
            dist.all_reduce(scatter, group=group)
        self.tokens, self.student_mean, self.teacher_mean = total, student_mean.clone(), teacher_mean.clone()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return all fields as tensors by name, for a safetensors file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "tokens": torch.tensor([self.tokens], dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Moments:
        """Return the moments from the result of `tensors`."""
        parts: dict[str, Any] = {**tensors, "tokens": int(tensors["tokens"])}
        return cls(**parts)

    def _join_means(self, tokens: int, student_mean: torch.Tensor, teacher_mean: torch.Tensor) -> None:
        """Update count and means for `tokens` more tokens whose scatters are already added."""
        if tokens == 0:
            return
        total = self.tokens + tokens
        student_step, teacher_step = student_mean - self.student_mean, teacher_mean - self.teacher_mean
        self._correct_scatters(student_step, teacher_step, self.tokens * tokens / total)
        self.student_mean += student_step * (tokens / total)
        self.teacher_mean += teacher_step * (tokens / total)
        self.tokens = total

    def _correct_scatters(self, student_step: torch.Tensor, teacher_step: torch.Tensor, weight: float) -> None:
        self.student_scatter.addr_(student_step, student_step, alpha=weight)
        self.teacher_scatter.addr_(teacher_step, teacher_step, alpha=weight)
        self.cross_scatter.addr_(student_step, teacher_step, alpha=weight)


def float64_chunks(student: torch.Tensor, teacher: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the states [n, d_S] and [n, d_T] in float64, a bounded number of tokens at a time.

    Raises:
        ValueError: the numbers of tokens differ.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} states of the student, {len(teacher)} of the teacher")
    for start in range(0, len(student), _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        yield student[chunk].double(), teacher[chunk].double()
