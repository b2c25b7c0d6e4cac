"""Weights of sampled tokens by their position in the response (IW-OPD, arXiv 2606.22600). No communication."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SUM = 1e-8  # added to the divisor: equal models have no disagreement


def position_weights(log_ratios: Tensor, lengths: Tensor, importance: float) -> Tensor:
    """Return w_t = 1 + importance (1 - sum_(k<t) a_k / sum_k a_k) with a_t = |log q(y_t) - log p(y_t)|, in float64.

    Args:
        log_ratios: [sequences, positions], log q(y_t) - log p(y_t) of the sampled tokens in order.
        lengths: [sequences] int64, at least 1. The weights at later positions are that of the last token.
    """
    positions = torch.arange(log_ratios.shape[1], device=log_ratios.device)
    gaps = log_ratios.double().abs() * (positions < lengths[:, None])
    before = gaps.cumsum(1) - gaps
    weights = 1 + importance * (1 - before / (gaps.sum(1, keepdim=True) + _LEAST_SUM))
    return weights.gather(1, positions.minimum(lengths[:, None] - 1))
