"""Divergences between a student's distribution p and a teacher's q, with their gradients in closed form.

Let g_v = dD/dp_v. The gradient with respect to the student's logits is p_v * (g_v - sum_u p_u g_u), in which a constant
in g cancels.

Each function takes log_p and log_q [n, width], finite and normalised over the columns of all ranks of `shard`, and
overwrites both. It returns the value [n], bitwise equal on all ranks, and the gradient [n, width] for this rank's
columns, in the memory of log_p. Each needs one all_reduce. Equal inputs give exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_oprd.losses.vocabulary import VocabularyShard


def divergence(
    log_p: Tensor, log_q: Tensor, shard: VocabularyShard, direction: str, beta: float, tail: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return KL(p || q) (`reverse`), KL(q || p) (`forward`), the generalised JSD(beta) (`jsd`, arXiv 2306.13649), or
    the skew divergence KL(p || beta p + (1 - beta) q) (`skew_reverse`) or KL(q || beta q + (1 - beta) p)
    (`skew_forward`) of DistiLLM (arXiv 2402.03898), which is the KL divergence for beta 0, or the mean of both KL
    divergences in `adaptive_kl` (`adaptive`).

    `tail` [n, width] is the tail of the teacher for `adaptive`; None: `shard.lower_half(log_q)`.

    JSD(beta) = beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p. It vanishes for beta 0 and 1. As
    in TRL, beta 0 means the limit of JSD(beta) / beta, which is the forward KL, and beta 1 the limit of
    JSD(beta) / (1 - beta), which is the reverse KL.
    """
    if direction == "reverse" or (direction, beta) in (("jsd", 1.0), ("skew_reverse", 0.0)):
        return reverse_kl(log_p, log_q, shard)
    if direction == "forward" or (direction, beta) in (("jsd", 0.0), ("skew_forward", 0.0)):
        return forward_kl(log_p, log_q, shard)
    if direction == "jsd":
        return jensen_shannon(log_p, log_q, shard, beta)
    if direction == "skew_reverse":
        return skew_reverse_kl(log_p, log_q, shard, beta)
    if direction == "skew_forward":
        return skew_forward_kl(log_p, log_q, shard, beta)
    if direction == "adaptive":
        return adaptive_kl(log_p, log_q, shard, shard.lower_half(log_q) if tail is None else tail)
    raise ValueError(f"unknown direction {direction!r}")


def reverse_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Return KL(p || q), OPRD eq. (4); g = log p - log q. Allocates one temporary [n, width]."""
    ratio = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    value = shard.sum((p * ratio).sum(-1))
    return value, p.mul_(ratio.sub_(value[:, None]))


def forward_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Return KL(q || p); g = -q / p, so the gradient is p - q. Allocates one temporary [n, width]."""
    ratio = log_q - log_p
    q = log_q.exp_()
    value = shard.sum(ratio.mul_(q).sum(-1))
    return value, log_p.exp_().sub_(q)


def jensen_shannon(log_p: Tensor, log_q: Tensor, shard: VocabularyShard, beta: float) -> tuple[Tensor, Tensor]:
    """Return JSD(beta), 0 < beta < 1; g = (1 - beta) (log p - log m). Allocates three temporaries [n, width]."""
    teacher_ratio = log_q - log_p
    mixture_ratio = _log_mixture_over_student(teacher_ratio, beta)  # log m - log p
    p, q = log_p.exp_(), log_q.exp_()
    teacher_part = teacher_ratio.sub_(mixture_ratio).mul_(q).sum(-1)  # KL(q || m)
    student_part = torch.mul(p, mixture_ratio, out=teacher_ratio).sum(-1)  # -KL(p || m)
    teacher_part, student_part = shard.sum(torch.stack([teacher_part, student_part]))
    value = beta * teacher_part - (1 - beta) * student_part
    return value, p.mul_(mixture_ratio.sub_(student_part[:, None])).mul_(beta - 1)


def skew_reverse_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard, skew: float) -> tuple[Tensor, Tensor]:
    """Return KL(p || m) with m = skew p + (1 - skew) q, 0 < skew < 1; g = -r - skew e^-r with r = log(m / p).

    Allocates three temporaries [n, width].
    """
    ratio = _log_mixture_over_student(torch.sub(log_q, log_p, out=log_q), 1 - skew)
    p = log_p.exp_()
    part = torch.add(ratio, ratio.neg().expm1_(), alpha=skew).neg_()  # g plus a constant, exactly 0 if p = q
    value, mean = shard.sum(torch.stack([-(p * ratio).sum(-1), (p * part).sum(-1)]))
    return value, p.mul_(part.sub_(mean[:, None]))


def skew_forward_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard, skew: float) -> tuple[Tensor, Tensor]:
    """Return KL(q || m) with m = skew q + (1 - skew) p, 0 < skew < 1; g = -(1 - skew) q / m.

    Allocates three temporaries [n, width].
    """
    teacher_ratio = log_q - log_p
    ratio = _log_mixture_over_student(teacher_ratio, skew)  # log m - log p
    p, q = log_p.exp_(), log_q.exp_()
    of_mixture = teacher_ratio.sub_(ratio)  # log q - log m
    value = (q * of_mixture).sum(-1)
    part = of_mixture.expm1_().neg_()  # 1 - q / m, exactly 0 if p = q
    value, mean = shard.sum(torch.stack([value, (p * part).sum(-1)]))
    return value, p.mul_(part.sub_(mean[:, None])).mul_(1 - skew)


def adaptive_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Return w KL(q || p) + (1 - w) KL(p || q) of AKL (arXiv 2404.02657), with w held constant.

    w is the part of the sum of |q - p| that lies outside of `tail` [n, width], which holds the teacher's less likely
    tokens (`VocabularyShard.lower_half`). Allocates three temporaries [n, width].
    """
    ratio = log_p - log_q
    p, q = log_p.exp_(), log_q.exp_()
    gap = (p - q).abs_()
    head_gap, tail_gap = gap.masked_fill(tail, 0).sum(-1), gap.mul_(tail).sum(-1)
    forward, reverse = -torch.mul(q, ratio, out=gap).sum(-1), torch.mul(p, ratio, out=gap).sum(-1)
    head_gap, tail_gap, forward, reverse = shard.sum(torch.stack([head_gap, tail_gap, forward, reverse]))
    share = head_gap / (head_gap + tail_gap).clamp_min_(torch.finfo(gap.dtype).tiny)
    of_reverse = ratio.sub_(reverse[:, None]).mul_(p).mul_((1 - share)[:, None])
    return share * forward + (1 - share) * reverse, p.sub_(q).mul_(share[:, None]).add_(of_reverse)


def _log_mixture_over_student(teacher_ratio: Tensor, beta: float) -> Tensor:
    """Return log(m / p) = log(1 - beta + beta e^u) from u = log q - log p, without overflow and exactly zero at u = 0.

    For u <= 0 this is log1p(beta * expm1(u)), for u > 0 it is u + log1p((1 - beta) * expm1(-u)).
    """
    weight = (teacher_ratio > 0).to(teacher_ratio.dtype).mul_(1 - 2 * beta).add_(beta)
    result = teacher_ratio.abs().neg_().expm1_().mul_(weight).log1p_()
    result.add_(torch.clamp(teacher_ratio, min=0, out=weight))
    # m lies between p and q. Without this bound a beta that rounds to an end (1 - beta == 1) gives log1p(-1).
    return torch.maximum(result, torch.clamp(teacher_ratio, max=0, out=weight), out=result)
