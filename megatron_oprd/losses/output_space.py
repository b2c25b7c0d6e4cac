"""The output-space objectives (OPD): the value of each token and its gradient for the student's logits, in closed form.

p and q are the next-token distributions of student and teacher; d = log p - log q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.divergence import divergence
from megatron_oprd.losses.vocabulary import VocabularyShard

METRICS = (
    "reverse_kl",
    "sampled_kl",
    "student_entropy",
    "teacher_entropy",
    "topk_overlap",
    "student_mass",
    "teacher_mass",
    "argmax_agreement",
)


@dataclass(frozen=True)
class TokenObjective:
    """The objective of each token of one chunk. `value` and `metrics` are equal on all ranks of the shard's group."""

    value: Tensor  # [n]
    gradient: Tensor  # [n, width], for this rank's columns of the student's logits after the temperature
    metrics: Tensor | None  # [n, len(METRICS)]


@dataclass(frozen=True)
class _Support:
    """The set S of token ids of a top-k objective."""

    ids: Tensor  # [n, m], equal on all ranks
    counts: Tensor  # [n, m] bool: False at the second copy of an id that is in the top k of both models


@torch.no_grad()
def token_objective(
    student_logits: Tensor,
    teacher_logits: Tensor,
    token_ids: Tensor,
    shard: VocabularyShard,
    config: OutputConfig,
    *,
    with_metrics: bool,
) -> TokenObjective:
    """Return the objective `config.objective` of each token, its gradient and, with `with_metrics`, the METRICS.

    Args:
        student_logits, teacher_logits: [n, width], this rank's columns, finite, in float32 or float64, already divided
            by their temperatures. BOTH ARE OVERWRITTEN; the gradient takes the memory of student_logits.
        token_ids: [n] int64, the sampled tokens y_t.

    Communicates over `shard.group`: 3 all_reduces; one all_gather for each ranking of a top-k objective; 2 more
    all_reduces with the tail bucket, 2 more with metrics, and those of `VocabularyShard.lower_half` for the adaptive
    divergence over the whole vocabulary.
    """
    is_topk = config.forward_above_entropy is not None or config.objective in ("topk_surrogate", "topk_kl")
    # Rank before subtracting the log-sum-exp: its rounding depends on the number of ranks and can make logits equal.
    top = _rankings(student_logits, teacher_logits, shard, config, with_metrics) if is_topk or with_metrics else {}
    needs_tail = config.objective == "full_kl" and config.direction == "adaptive"
    tail = shard.lower_half(teacher_logits) if needs_tail else None
    shard.normalize_(student_logits, teacher_logits)
    log_p, log_q = student_logits, teacher_logits
    metrics = _metrics(log_p, log_q, token_ids, top, shard, config) if with_metrics else None
    if config.forward_above_entropy is not None:
        entropy = config.forward_above_entropy
        value, gradient = _sampled_and_forward(log_p, log_q, token_ids, top["teacher"], shard, entropy)
    elif config.objective == "sampled":
        value, gradient = _sampled(log_p, log_q, token_ids, shard)
    elif config.objective == "topk_surrogate":
        value, gradient = _topk_surrogate(log_p, log_q, _support(top, config), shard)
    elif config.objective == "topk_kl":
        value, gradient = _topk_kl(log_p, log_q, _support(top, config), shard, config)
    elif config.objective == "full_kl":
        value, gradient = divergence(log_p, log_q, shard, config.direction, config.mixture, tail)
    else:
        raise ValueError(f"no objective {config.objective!r}")
    return TokenObjective(value, gradient, metrics)


def _sampled(log_p: Tensor, log_q: Tensor, token_ids: Tensor, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Return -A log p(y), with A = -(log p(y) - log q(y)) held constant; the gradient is -A (e_y - p)."""
    ids = token_ids[:, None]
    student, teacher = _gather_both(log_p, log_q, ids, shard)
    advantage = teacher - student
    gradient = log_p.exp_().mul_(advantage)
    return (-advantage * student).squeeze(1), shard.add_(gradient, ids, -advantage)


def _sampled_and_forward(
    log_p: Tensor, log_q: Tensor, token_ids: Tensor, top_ids: Tensor, shard: VocabularyShard, least_entropy: float
) -> tuple[Tensor, Tensor]:
    """Return `_sampled`, plus the sum over the teacher's top k of q (log q - log p), not renormalised, at tokens where
    the teacher's entropy is above `least_entropy` (EOPD, arXiv 2603.07079).

    The gradient of the sum is p times its mass of q, minus q at the top k. Two more all_reduces and one temporary.
    """
    q = log_q.exp()
    entropy = -shard.sum(q.mul_(log_q).sum(-1))
    is_open = (entropy > least_entropy).to(log_p.dtype)[:, None]
    student, teacher = _gather_both(log_p, log_q, top_ids, shard)
    weights = teacher.exp().mul_(is_open)
    mass = torch.exp(log_p, out=q).mul_(weights.sum(-1, keepdim=True))
    value, gradient = _sampled(log_p, log_q, token_ids, shard)
    gradient = shard.add_(gradient.add_(mass), top_ids, -weights)
    return value + (weights * (teacher - student)).sum(-1), gradient


def _topk_surrogate(log_p: Tensor, log_q: Tensor, support: _Support, shard: VocabularyShard) -> tuple[Tensor, Tensor]:
    """Return the sum over S of w d log p, with w (p renormalised on S) and d held constant: OPRD eq. (5) as its authors
    implemented it. The gradient is the sum over S of w_v d_v (e_v - p)."""
    student, teacher = _gather_both(log_p, log_q, support.ids, shard)
    weights = _drop_copies(student, support).softmax(-1)
    weighted = weights * (student - teacher)
    gradient = log_p.exp_().mul_(-weighted.sum(-1, keepdim=True))
    return (weighted * student).sum(-1), shard.add_(gradient, support.ids, weighted)


def _topk_kl(
    log_p: Tensor, log_q: Tensor, support: _Support, shard: VocabularyShard, config: OutputConfig
) -> tuple[Tensor, Tensor]:
    """Return the divergence between p and q on S, OPRD eq. (5). Both are renormalised on S; with `tail_bucket` they are
    not, and one more outcome has the probability of all other tokens."""
    log_probs = _drop_copies(_gather_both(log_p, log_q, support.ids, shard), support)  # [2, n, m]
    if config.tail_bucket:
        # Sum the other tokens: 1 - (mass of S) would round to zero. Normalising them gives log p(v | not in S).
        outside = support.counts.to(log_p.dtype).mul_(_never(log_p))
        for log_probability in (log_p, log_q):
            shard.add_(log_probability, support.ids, outside)
        tail = shard.normalize_(log_p, log_q)
        log_probs = torch.cat([log_probs, tail[..., None]], dim=-1)
    else:
        log_probs = log_probs.log_softmax(-1)
    # Every rank has all outcomes here, so that the sums need no communication.
    value, outcomes = divergence(log_probs[0], log_probs[1], VocabularyShard(), config.direction, config.mixture)
    if config.tail_bucket:
        gradient, outcomes = log_p.exp_().mul_(outcomes[:, -1:]), outcomes[:, :-1]
    else:
        gradient = log_p.zero_()
    return value, shard.add_(gradient, support.ids, outcomes)


def _metrics(
    log_p: Tensor,
    log_q: Tensor,
    token_ids: Tensor,
    top: Mapping[str, Tensor],
    shard: VocabularyShard,
    config: OutputConfig,
) -> Tensor:
    """Return the metrics [n, len(METRICS)] and leave log_p and log_q unchanged.

    Needs two all_reduces and two temporaries [n, width].
    """
    probability, ratio = log_p.exp(), log_p - log_q
    reverse_kl = ratio.mul_(probability).sum(-1)
    student_entropy = -probability.mul_(log_p).sum(-1)
    teacher_entropy = -torch.exp(log_q, out=probability).mul_(log_q).sum(-1)
    over_vocabulary = shard.sum(torch.stack([reverse_kl, student_entropy, teacher_entropy]))
    support = _support(top, config)
    log_probs = _gather_both(log_p, log_q, torch.cat([token_ids[:, None], support.ids], dim=1), shard)
    sampled_kl = log_probs[0, :, 0] - log_probs[1, :, 0]
    mass = log_probs[:, :, 1:].exp().mul_(support.counts).sum(-1)
    student_top, teacher_top = top["student"], top["teacher"]
    shared = 2 * student_top.shape[1] - _union(student_top, teacher_top).counts.sum(-1)
    columns = {
        **dict(zip(("reverse_kl", "student_entropy", "teacher_entropy"), over_vocabulary, strict=True)),
        "sampled_kl": sampled_kl,
        "topk_overlap": shared.to(log_p.dtype) / student_top.shape[1],
        "student_mass": mass[0],
        "teacher_mass": mass[1],
        "argmax_agreement": (student_top[:, 0] == teacher_top[:, 0]).to(log_p.dtype),
    }
    return torch.stack([columns[name] for name in METRICS], dim=-1)


def _rankings(
    student_logits: Tensor, teacher_logits: Tensor, shard: VocabularyShard, config: OutputConfig, both: bool
) -> dict[str, Tensor]:
    """Return the top k ids [n, k] of both models (`both`), or of the models that `config.support` names."""
    logits = {"student": student_logits, "teacher": teacher_logits}
    support = "teacher" if config.forward_above_entropy is not None else config.support
    return {model: shard.top(logits[model], config.k) for model in logits if both or support in (model, "union")}


def _support(top: Mapping[str, Tensor], config: OutputConfig) -> _Support:
    if config.support == "union":
        return _union(top["student"], top["teacher"])
    ids = top[config.support]
    return _Support(ids, torch.ones_like(ids, dtype=torch.bool))


def _union(first: Tensor, second: Tensor) -> _Support:
    ids = torch.cat([first, second], dim=-1).sort(dim=-1).values
    counts = torch.ones_like(ids, dtype=torch.bool)
    counts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return _Support(ids, counts)


def _gather_both(log_p: Tensor, log_q: Tensor, ids: Tensor, shard: VocabularyShard) -> Tensor:
    """Return the entries of log_p and log_q at ids [n, m], stacked [2, n, m], equal on all ranks. One all_reduce."""
    return shard.sum(torch.stack([shard.pick(log_p, ids), shard.pick(log_q, ids)]))


def _drop_copies(log_probs: Tensor, support: _Support) -> Tensor:
    return log_probs.masked_fill(~support.counts, _never(log_probs))


def _never(like: Tensor) -> float:
    """Return a finite stand-in for log 0, so that the difference of two is never nan."""
    return torch.finfo(like.dtype).min / 4
