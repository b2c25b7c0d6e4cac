"""Divergences between a student's p and a teacher's q from their logarithms, with the gradient in closed form.

With g_v = dD/dp_v, the gradient for the student's logits is p_v * (g_v - sum_u p_u g_u); a constant in g cancels.
All functions take log_p, log_q [n, width], normalised over all columns of `shard`, overwrite both, and return the
value [n] (same bits on every rank) and, in the memory of log_p, the gradient [n, width] of this rank's columns. One
all_reduce each. Entries are finite; equal inputs give exactly zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_oprd.losses.vocabulary import VocabularyShard


def divergence(
    log_p: Tensor, log_q: Tensor, shard: VocabularyShard, direction: str, beta: float
) -> tuple[Tensor, Tensor]:
    """KL(p || q) (`reverse`), KL(q || p) (`forward`) or the generalised JSD(beta) (`jsd`, arXiv 2306.13649).

    JSD(beta) = beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p, vanishes at both ends. There it is,
    as in TRL, what its quotient tends to: forward KL at 0 (of JSD(beta) / beta), reverse KL at 1 (of
    JSD(beta) / (1 - beta)).
    """
    if direction == "reverse" or (direction == "jsd" and beta == 1.0):
        return reverse_kl(log_p, log_q, shard)
    if direction == "forward" or (direction == "jsd" and beta == 0.0):
        return forward_kl(log_p, log_q, shard)
    if direction == "jsd":
        return jensen_shannon(log_p, log_q, shard, beta)
    raise ValueError(f"unknown direction {direction!r}")


def reverse_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """KL(p || q); g = log p - log q. OPRD eq. (4). One temporary [n, width]."""
    ratio = torch.sub(log_p, log_q, out=log_q)
    p = log_p.exp_()
    value = shard.sum((p * ratio).sum(-1))
    return value, p.mul_(ratio.sub_(value[:, None]))


def forward_kl(log_p: Tensor, log_q: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """KL(q || p); g = -q / p, so the gradient is p - q. One temporary [n, width]."""
    ratio = log_q - log_p
    q = log_q.exp_()
    value = shard.sum(ratio.mul_(q).sum(-1))
    return value, log_p.exp_().sub_(q)


def jensen_shannon(log_p: Tensor, log_q: Tensor, shard: VocabularyShard, beta: float) -> tuple[Tensor, Tensor]:
    """Generalised JSD, 0 < beta < 1; g = (1 - beta) (log p - log m). Three temporaries [n, width]."""
    teacher_ratio = log_q - log_p
    mixture_ratio = _log_mixture_over_student(teacher_ratio, beta)  # log m - log p
    p, q = log_p.exp_(), log_q.exp_()
    teacher_part = teacher_ratio.sub_(mixture_ratio).mul_(q).sum(-1)  # KL(q || m)
    student_part = torch.mul(p, mixture_ratio, out=teacher_ratio).sum(-1)  # -KL(p || m)
    teacher_part, student_part = shard.sum(torch.stack([teacher_part, student_part]))
    value = beta * teacher_part - (1 - beta) * student_part
    return value, p.mul_(mixture_ratio.sub_(student_part[:, None])).mul_(beta - 1)


def _log_mixture_over_student(teacher_ratio: Tensor, beta: float) -> Tensor:
    """log(m / p) = log(1 - beta + beta e^u) from u = log q - log p.

    log1p(beta * expm1(u)) for u <= 0, u + log1p((1 - beta) * expm1(-u)) above: never overflows, zero at u = 0.
    """
    weight = (teacher_ratio > 0).to(teacher_ratio.dtype).mul_(1 - 2 * beta).add_(beta)
    result = teacher_ratio.abs().neg_().expm1_().mul_(weight).log1p_()
    result.add_(torch.clamp(teacher_ratio, min=0, out=weight))
    # m lies between p and q. Without this bound a beta that rounds to an end (1 - beta == 1) gives log1p(-1).
    return torch.maximum(result, torch.clamp(teacher_ratio, max=0, out=weight), out=result)
