"""Fit the bridge of a layer pair in closed form from its moments (OPRD eq. (12)-(13)). No communication."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.types import PairBridge, UserError


@dataclass(frozen=True)
class TeacherDirections:
    """The leading principal components of a teacher layer, float64. A lower rank uses the first of them."""

    mean: torch.Tensor  # mu_T [d_T]
    directions: torch.Tensor  # [r, d_T] orthonormal rows: P_T, not whitened
    eigenvalues: torch.Tensor  # [r] variance along each direction
    variance: float  # trace of the covariance


@dataclass(frozen=True)
class PairFit:
    """The bridge of a layer pair at one rank, with its errors on held-out tokens."""

    bridge: PairBridge
    ridge: float | None  # None for AdamW
    error: float  # mean of ||z_S - z_T||^2 over held-out tokens
    total: float  # mean of ||z_T||^2 over held-out tokens: the error of P_S = 0
    eigenvalues: torch.Tensor  # [r] float64, on the CPU
    explained_variance: float  # share of the teacher's variance in the r directions


def check_ranks(ranks: Sequence[int], student_width: int, teacher_width: int) -> None:
    """Raise UserError for a rank above one of the hidden sizes."""
    widest = min(student_width, teacher_width)
    if max(ranks) > widest:
        raise UserError(
            f"bridge.ranks: {max(ranks)} is more than {widest}, the smaller hidden size of student ({student_width}) "
            f"and teacher ({teacher_width}); ranks go up to {widest}"
        )


def check_tokens(train: Moments, held_out: Moments, ranks: Sequence[int]) -> None:
    """Raise UserError if either part has too few tokens for the largest rank, or states that are not finite."""
    for moments, kind in ((train, "training"), (held_out, "held-out")):
        if moments.tokens <= max(ranks):
            raise UserError(
                f"a bridge of rank {max(ranks)} needs more than {max(ranks)} {kind} tokens, there are "
                f"{moments.tokens}; raise bridge.prompts, change bridge.held_out_fraction or lower bridge.ranks"
            )
        # A state that is not finite makes an entry of the diagonal not finite.
        for model, scatter in (("student", moments.student_scatter), ("teacher", moments.teacher_scatter)):
            if not torch.isfinite(scatter.diagonal()).all():
                raise UserError(f"states of the {model} are NaN or infinite on {kind} tokens; try another precision")


def fit_pair(
    train: Moments,
    held_out: Moments,
    ranks: Sequence[int],
    ridges: Sequence[float],
    teacher: TeacherDirections | None = None,
) -> dict[int, PairFit]:
    """Return the bridge of a layer pair at each rank, with the ridge that has the least error on held-out tokens.

    Args:
        ridges: candidates; of equal errors the earlier ridge is chosen.
        teacher: at least max(ranks) directions of the teacher's layer, if they are already known from another pair.

    Raises:
        UserError: there are too few tokens, or a rank is above a hidden size.
    """
    check_ranks(ranks, len(train.student_mean), len(train.teacher_mean))
    check_tokens(train, held_out, ranks)
    if teacher is None:
        teacher = teacher_directions(train, max(ranks))
    best: dict[int, tuple[float, float, torch.Tensor]] = {}
    for ridge, student_map in zip(ridges, _least_squares(train, teacher, ridges), strict=True):
        # Rows are fitted independently: a smaller rank has the first rows, and its error is the sum over them.
        errors = _row_errors(student_map, teacher.directions, teacher.mean, held_out).cumsum(0)
        for rank in ranks:
            error = float(errors[rank - 1])
            if rank not in best or error < best[rank][0]:
                best[rank] = (error, ridge, student_map[:rank])
    return {rank: describe(best[rank][2], teacher, held_out, best[rank][1]) for rank in ranks}


def teacher_directions(moments: Moments, rank: int) -> TeacherDirections:
    """Return the first `rank` principal components of the teacher's states.

    The entry of largest magnitude of each direction is positive: equal moments give equal directions.
    """
    eigenvalues, eigenvectors = torch.linalg.eigh(moments.teacher_scatter / moments.tokens)
    directions = eigenvectors.flip(1)[:, :rank].T
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return TeacherDirections(
        mean=moments.teacher_mean,
        directions=directions * largest.sign(),
        eigenvalues=eigenvalues.flip(0)[:rank].clamp(min=0.0),
        variance=float(moments.teacher_scatter.trace() / moments.tokens),
    )


def held_out_error(bridge: PairBridge, moments: Moments) -> float:
    """Return the mean of ||P_S x - P_T (y - mu_T)||^2 over the tokens of the moments, computed in float64."""
    student_map, teacher_map, mean = bridge.student_map.double(), bridge.teacher_map.double(), bridge.teacher_mean
    return float(_row_errors(student_map, teacher_map, mean.double(), moments).sum())


def describe(
    student_map: torch.Tensor, teacher: TeacherDirections, held_out: Moments, ridge: float | None = None
) -> PairFit:
    """Return the bridge of a fitted map [r, d_S], in float32 on the CPU, with its errors on held-out tokens."""
    rank = len(student_map)
    bridge = PairBridge(
        student_map.float().contiguous(), teacher.directions[:rank].float().contiguous(), teacher.mean.float()
    )
    zero_map = PairBridge(torch.zeros_like(bridge.student_map), bridge.teacher_map, bridge.teacher_mean)
    eigenvalues = teacher.eigenvalues[:rank].cpu()
    return PairFit(
        bridge=PairBridge(*(getattr(bridge, field.name).cpu() for field in dataclasses.fields(bridge))),
        ridge=ridge,
        error=held_out_error(bridge, held_out),
        total=held_out_error(zero_map, held_out),
        eigenvalues=eigenvalues,
        explained_variance=float(eigenvalues.sum()) / teacher.variance if teacher.variance else 0.0,
    )


def _least_squares(train: Moments, teacher: TeacherDirections, ridges: Sequence[float]) -> Iterator[torch.Tensor]:
    """Yield for each ridge the least-squares map P_S [r, d_S], float64.

    P_S minimises the mean over tokens of ||P_S x - P_T (y - mu_T)||^2 plus lambda ||P_S||^2, with
    lambda = ridge * trace(E[x x^T]) / d_S. All ridges use one eigendecomposition of E[x x^T].

    x is not centred. Directions in which x is always zero get zero weight (the solution of least norm).
    """
    second_moment = train.student_scatter / train.tokens + torch.outer(train.student_mean, train.student_mean)
    eigenvalues, eigenvectors = torch.linalg.eigh(second_moment)
    width = len(eigenvalues)
    present = eigenvalues > eigenvalues[-1] * width * torch.finfo(torch.float64).eps
    # E[(y - mu_T) x^T] equals the centred moment, since mu_T is the mean over the same tokens.
    targets = teacher.directions @ (train.cross_scatter.T / train.tokens) @ eigenvectors
    for ridge in ridges:
        damped = eigenvalues + ridge * second_moment.trace() / width
        yield torch.where(present, targets / damped, 0.0) @ eigenvectors.T


def _row_errors(
    student_map: torch.Tensor, teacher_map: torch.Tensor, teacher_mean: torch.Tensor, moments: Moments
) -> torch.Tensor:
    """Return the mean squared error of each row, [r], over the tokens of the moments: variance plus squared bias."""
    variance = (
        (student_map @ moments.student_scatter * student_map).sum(dim=1)
        - 2.0 * (student_map @ moments.cross_scatter * teacher_map).sum(dim=1)
        + (teacher_map @ moments.teacher_scatter * teacher_map).sum(dim=1)
    ) / moments.tokens
    bias = student_map @ moments.student_mean - teacher_map @ (moments.teacher_mean - teacher_mean)
    return variance.clamp(min=0.0) + bias**2  # rounding can make a zero variance negative
