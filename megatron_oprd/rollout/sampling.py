"""Sample tokens from logits with given uniform numbers: equal logits and numbers give equal tokens."""

from __future__ import annotations

import numpy as np
import torch

from megatron_oprd.rollout.engine import Sampling

BLOCK = 512  # tokens per block of `inverse_cdf`


def uniforms(seed: int, step: int, prompt_index: int, sample_index: int, count: int) -> np.ndarray:
    """Return the uniform numbers in [0, 1) for the first `count` tokens of a rollout, float64 [count].

    The numbers depend on the arguments only, not on the rank, the slot or the other prompts of the batch.
    """
    return np.random.default_rng([seed, step, prompt_index, sample_index]).random(count)


def sample(logits: torch.Tensor, sampling: Sampling, numbers: torch.Tensor | None) -> torch.Tensor:
    """Return one sampled token for each row, [rows] int64. No communication.

    Args:
        logits: [rows, vocabulary], without vocabulary padding.
        numbers: uniform numbers in [0, 1), [rows] float64; not used with temperature 0.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return inverse_cdf(token_weights(logits, sampling), numbers)


def token_logprobs(logits: torch.Tensor, sampling: Sampling, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of each sampled token [rows] under the distribution it was drawn from, [rows] float64.

    That is the distribution after temperature, top-k and top-p; with temperature 0 the softmax of the logits.
    """
    if sampling.temperature == 0:
        sampling = Sampling()
    weights = token_weights(logits, sampling)
    return weights.gather(1, tokens[:, None])[:, 0].double().log() - weights.sum(dim=-1, dtype=torch.float64).log()


def token_weights(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return weights [rows, vocabulary] float32, proportional to the probabilities after temperature, top-k and top-p.

    Excluded tokens have weight 0. Among tokens with equal logits at the limit of top-k, any may be kept.
    """
    logits = logits.float()
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature).exp()
    vocabulary = weights.shape[-1]
    if sampling.top_p >= 1.0 and not 0 < sampling.top_k < vocabulary:
        return weights
    kept, ids = weights.topk(min(sampling.top_k, vocabulary) or vocabulary, dim=-1)
    if sampling.top_p < 1.0:
        # A token is kept if the more likely tokens together are below top_p. The first token is always kept.
        before = kept.cumsum(dim=-1, dtype=torch.float64) - kept
        kept = kept.masked_fill(before >= sampling.top_p * kept.sum(dim=-1, keepdim=True, dtype=torch.float64), 0.0)
    # Restore the order of the vocabulary. In sorted order, a rounding error that swaps two nearly equal tokens would
    # change which of them a uniform number selects.
    return torch.zeros_like(weights).scatter_(1, ids, kept)


def inverse_cdf(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return the first token of each row whose cumulative weight exceeds `numbers` * total, [rows] int64.

    The search has two levels in float64, blocks and then tokens of one block: a cumulative sum over 150,000 tokens
    would cost more than the LM head.

    Args:
        weights: [rows, vocabulary], not negative, not all 0; need not sum to 1.
        numbers: [rows] float64.
    """
    rows, vocabulary = weights.shape
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    block_ends = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    target = numbers * block_ends[:, -1]
    block = _first_above(block_ends, target)
    start = torch.where(block > 0, block_ends.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(rows, device=weights.device), block]
    return block * BLOCK + _first_above(inside.cumsum(dim=-1, dtype=torch.float64), target - start)


def _first_above(ends: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the index of the first of the ascending `ends` [rows, n] above `target` [rows].

    If none is above because of rounding, return the last index with a weight above 0.
    """
    first = (ends <= target[:, None]).sum(dim=-1)
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(first, last)
