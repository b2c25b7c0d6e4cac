"""From logits and uniform numbers to tokens: no generator in here, so the same numbers give the same tokens."""

from __future__ import annotations

import numpy as np
import torch

from megatron_oprd.rollout.engine import Sampling

BLOCK = 512  # tokens summed at once by `inverse_cdf`


def uniforms(seed: int, step: int, prompt_index: int, sample_index: int, count: int) -> np.ndarray:
    """The numbers in [0, 1) that draw the first `count` tokens of a rollout, float64 [count].

    They depend on nothing else: not on the rank, the other prompts of the batch or the slot.
    """
    return np.random.default_rng([seed, step, prompt_index, sample_index]).random(count)


def sample(logits: torch.Tensor, sampling: Sampling, numbers: torch.Tensor | None) -> torch.Tensor:
    """One token a row, [rows] int64, from logits [rows, vocabulary] (without padding) and `numbers` [rows] float64 in
    [0, 1), which temperature 0 does not read. No communication."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    return inverse_cdf(token_weights(logits, sampling), numbers)


def token_weights(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Weights [rows, vocabulary] float32 proportional to the probabilities after temperature, top-k and top-p.

    A token ruled out weighs 0. Of tokens with equal logits at the edge of the top k, any may be kept.
    """
    logits = logits.float()
    weights = ((logits - logits.amax(dim=-1, keepdim=True)) / sampling.temperature).exp()
    vocabulary = weights.shape[-1]
    if sampling.top_p >= 1.0 and not 0 < sampling.top_k < vocabulary:
        return weights
    kept, ids = weights.topk(min(sampling.top_k, vocabulary) or vocabulary, dim=-1)
    if sampling.top_p < 1.0:
        # A token stays when those before it do not reach top_p yet: the first one always does.
        before = kept.cumsum(dim=-1, dtype=torch.float64) - kept
        kept = kept.masked_fill(before >= sampling.top_p * kept.sum(dim=-1, keepdim=True, dtype=torch.float64), 0.0)
    # Back to the order of the vocabulary: among sorted tokens a rounding error that swaps two nearly equal ones would
    # change which of them a number draws.
    return torch.zeros_like(weights).scatter_(1, ids, kept)


def inverse_cdf(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The token of each row at which the cumulative weight passes `numbers` * total: [rows] int64.

    weights [rows, vocabulary] >= 0, not all 0, need not sum to 1; numbers [rows] float64. In two levels, blocks and
    then tokens of one block, in float64: a cumulative sum over 150,000 tokens would cost more than the LM head.
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
    """Index of the first of the ascending `ends` [rows, n] above `target` [rows]. Rounding can leave none: then the
    last one that adds weight, never one of weight 0."""
    first = (ends <= target[:, None]).sum(dim=-1)
    last = (ends < ends[:, -1:]).sum(dim=-1)
    return torch.minimum(first, last)
