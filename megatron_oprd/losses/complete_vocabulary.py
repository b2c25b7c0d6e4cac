"""Objectives over the complete vocabulary from logits in the dtype of the model, for GPUs.

`output_space.py` computes the same in float32 buffers, each of which several kernels read and write. Here five kernels
read the logits of a chunk and one writes the gradient; float32 numbers exist in registers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.output_space import TokenObjective
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.runtime.fused import fused


@dataclass(frozen=True)
class Logits:
    """Logits of a model before the temperature, [n, width], this rank's columns."""

    values: Tensor
    temperature: float = 1.0


# A distribution as the functions that are compiled take it: logits [n, width], temperature, and for each token the
# highest logit after the temperature and the log of the sum of exponentials, [n] each.
Distribution = tuple[Tensor, float, Tensor, Tensor]


def is_supported(config: OutputConfig) -> bool:
    """Return True if this file has the objective."""
    if config.forward_above_entropy is not None:  # ranks tokens
        return False
    if config.objective == "full_kl":
        return config.direction in ("reverse", "forward")
    return config.objective == "sampled"


@torch.no_grad()
def complete_objective(
    student: Logits,
    teacher: Logits,
    token_ids: Tensor | None,
    shard: VocabularyShard,
    config: OutputConfig,
    scale: Tensor,
) -> TokenObjective:
    """Return the value of each token, and its gradient for the student's logits times `scale`, without metrics.

    Args:
        student: THE LOGITS ARE OVERWRITTEN BY THE GRADIENT.
        token_ids: [n] int64, the sampled tokens; None without the objective `sampled`.
        scale: [n] float32 or float64.

    Communicates over `shard.group`: 3 all_reduces.
    """
    p, q = _distributions(student, teacher, shard)
    scale = scale.to(p[3].dtype)
    if config.objective == "sampled":
        assert token_ids is not None
        log_p, log_q = _picked((p, q), token_ids, shard)
        gradient = _sampled_gradient_(*p, token_ids - shard.start, (log_q - log_p) * scale)
        return TokenObjective((log_p - log_q) * log_p, gradient, None)
    if config.direction == "forward":
        return TokenObjective(shard.sum(_kl(*q, *p)), _forward_gradient_(*p, *q, scale), None)
    value = shard.sum(_kl(*p, *q))
    return TokenObjective(value, _reverse_gradient_(*p, *q, value, scale), None)


@torch.no_grad()
def sampled_log_ratios(student: Logits, teacher: Logits, token_ids: Tensor, shard: VocabularyShard) -> Tensor:
    """Return log q - log p [n] of the sampled tokens [n], equal on all ranks, and leave the logits unchanged.

    Communicates over `shard.group`: 3 all_reduces.
    """
    log_p, log_q = _picked(_distributions(student, teacher, shard), token_ids, shard)
    return log_q - log_p


def _distributions(student: Logits, teacher: Logits, shard: VocabularyShard) -> list[Distribution]:
    """Normalise both models over the vocabulary of all ranks. Two all_reduces."""
    models = (student, teacher)
    highest = shard.max(torch.stack([_highest_or_none(one) for one in models]))
    sums = [_sum(one.values, one.temperature, shift) for one, shift in zip(models, highest, strict=True)]
    log_sums = shard.sum(torch.stack(sums)).log_()
    return [(one.values, one.temperature, *shifts) for one, *shifts in zip(models, highest, log_sums, strict=True)]


def _highest_or_none(model: Logits) -> Tensor:
    """Return the highest logits [n] after the temperature; -inf on a rank without columns."""
    tokens, width = model.values.shape
    if width:
        return _highest(model.values, model.temperature)
    return _wide(model.values, 1.0).new_full((tokens,), -torch.inf)


def _picked(models: Sequence[Distribution], token_ids: Tensor, shard: VocabularyShard) -> list[Tensor]:
    """Return the log-probabilities [n] of the tokens under each model, equal on all ranks. One all_reduce."""
    logits = [
        _wide(shard.pick(values, token_ids[:, None]).squeeze(1), temperature) for values, temperature, *_ in models
    ]
    picked = zip(models, shard.sum(torch.stack(logits)), strict=True)
    return [logit - highest - log_sum for (_, _, highest, log_sum), logit in picked]


def _wide(logits: Tensor, temperature: float) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature


def _log_probs(logits: Tensor, temperature: float, highest: Tensor, log_sum: Tensor) -> Tensor:
    # In two steps: the log of the sum is small, the highest logit may be large and would round it away.
    return _wide(logits, temperature) - highest[:, None] - log_sum[:, None]


@fused
def _highest(logits: Tensor, temperature: float) -> Tensor:
    return _wide(logits, temperature).amax(-1)


@fused
def _sum(logits: Tensor, temperature: float, highest: Tensor) -> Tensor:
    return (_wide(logits, temperature) - highest[:, None]).exp().sum(-1)


@fused
def _kl(
    a: Tensor,
    t_a: float,
    highest_a: Tensor,
    log_sum_a: Tensor,
    b: Tensor,
    t_b: float,
    highest_b: Tensor,
    log_sum_b: Tensor,
) -> Tensor:
    """Return this rank's part of KL(a || b)."""
    log_a, log_b = _log_probs(a, t_a, highest_a, log_sum_a), _log_probs(b, t_b, highest_b, log_sum_b)
    return (log_a.exp() * (log_a - log_b)).sum(-1)


@fused
def _reverse_gradient_(
    p: Tensor,
    t_p: float,
    highest_p: Tensor,
    log_sum_p: Tensor,
    q: Tensor,
    t_q: float,
    highest_q: Tensor,
    log_sum_q: Tensor,
    value: Tensor,
    scale: Tensor,
) -> Tensor:
    """Replace the student's logits `p` by p (log p - log q - value) scale."""
    log_p, log_q = _log_probs(p, t_p, highest_p, log_sum_p), _log_probs(q, t_q, highest_q, log_sum_q)
    return p.copy_(log_p.exp() * (log_p - log_q - value[:, None]) * scale[:, None])


@fused
def _forward_gradient_(
    p: Tensor,
    t_p: float,
    highest_p: Tensor,
    log_sum_p: Tensor,
    q: Tensor,
    t_q: float,
    highest_q: Tensor,
    log_sum_q: Tensor,
    scale: Tensor,
) -> Tensor:
    """Replace the student's logits `p` by (p - q) scale."""
    log_p, log_q = _log_probs(p, t_p, highest_p, log_sum_p), _log_probs(q, t_q, highest_q, log_sum_q)
    return p.copy_((log_p.exp() - log_q.exp()) * scale[:, None])


@fused
def _sampled_gradient_(
    p: Tensor, temperature: float, highest: Tensor, log_sum: Tensor, columns: Tensor, factor: Tensor
) -> Tensor:
    """Replace the logits `p` by (p - e_y) factor; `columns` [n] is the column of y, beyond the width on other ranks."""
    probabilities = _log_probs(p, temperature, highest, log_sum).exp()
    is_sampled = torch.arange(p.shape[1], device=p.device) == columns[:, None]
    return p.copy_((probabilities - is_sampled.to(probabilities.dtype)) * factor[:, None])
