"""Weights, sums and means of the loss: no other file divides a loss.

The loss is a mean over the global batch. Its divisors depend only on response lengths, which every rank has before the
first forward pass. Each selected token therefore has a constant weight, and every partial result is a plain sum of
weight * e, so the loss does not depend on micro-batches or ranks.

Megatron-Core multiplies losses and gradients by factors of its own. Each is kept at one:
- schedules divide the loss by the number of micro-batches, except with `calculate_per_token_loss`, which is set;
- DDP divides gradients by the data- x context-parallel size, except with `calculate_per_token_loss`: DDP then sums over
  data- and context-parallel ranks, and sums the gradients of experts over the ranks with the same experts;
- `finalize_model_grads` sums the gradients of parameters that sequence-parallel ranks share (norms, routers), and
  divides by a number of tokens if it receives one: `training/student.py` passes none;
- the optimizer's gradient scale is one for bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_oprd.losses.output_space import METRICS, TokenObjective
from megatron_oprd.losses.representation import TokenStatistics
from megatron_oprd.types import GlobalCounts


def count(selected_per_sequence: Iterable[int]) -> GlobalCounts:
    """Return the counts of sequences from the number of selected tokens of each. No communication."""
    lengths = list(selected_per_sequence)
    return GlobalCounts(sequences=sum(length > 0 for length in lengths), tokens=sum(lengths))


def token_weight(selected: int, counts: GlobalCounts, aggregation: str) -> float:
    """Return the weight, in AGG of OPRD eq. (6), of each token of a sequence with `selected` selected tokens.

    sequence_mean: 1 / (non-empty sequences * selected); token_mean: 1 / (all selected tokens).

    Raises:
        ValueError: another aggregation.
    """
    if aggregation == "sequence_mean":
        return 1.0 / (counts.sequences * selected)
    if aggregation == "token_mean":
        return 1.0 / counts.tokens
    raise ValueError(f"unknown aggregation {aggregation!r}")


def layer_weights(weights: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Return the token weights divided by the number of layers, for the mean over layers in L_rep."""
    return weights / num_layers


def square_sum(norms: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sum over tokens of the mean square of a state [width] in float64, from the norms [tokens]."""
    return norms.double().square().sum() / width


def layer_sums(statistics: TokenStatistics, weights: torch.Tensor) -> torch.Tensor:
    """Return the partial sums [4] in float64 of one layer on one micro-batch, to be added over micro-batches and ranks:
    the weighted sum of e, then the plain sums of cosine, student norm and teacher norm."""
    error = (weights.double() * statistics.error.double()).sum()
    rest = (statistics.cosine, statistics.student_norm, statistics.teacher_norm)
    return torch.stack([error, *(value.double().sum() for value in rest)])


def layer_metrics(sums: dict[int, list[float]], counts: GlobalCounts) -> dict[str, float]:
    """Return the metrics of each layer and their means over layers, from the global sums [4] of each student layer."""
    tokens = max(counts.tokens, 1)
    per_layer = {layer: [values[0], *(value / tokens for value in values[1:])] for layer, values in sums.items()}
    metrics: dict[str, float] = {}
    for position, name in enumerate(("mse", "cosine", "student_norm", "teacher_norm")):
        metrics[f"rep/{name}"] = sum(values[position] for values in per_layer.values()) / len(per_layer)
        metrics |= {f"rep/{name}/layer_{layer}": values[position] for layer, values in per_layer.items()}
    return metrics


def output_sums(tokens: TokenObjective, weights: torch.Tensor) -> torch.Tensor:
    """Return the partial sums [1 + METRICS] in float64 of an output-space objective, to be added over chunks,
    micro-batches and ranks: the weighted sum of the values, then the plain sums of the metrics (zeros without them)."""
    value = (weights.double() * tokens.value.double()).sum()[None]
    if tokens.metrics is None:
        return torch.cat((value, value.new_zeros(len(METRICS))))
    return torch.cat((value, tokens.metrics.double().sum(0)))


def output_metrics(sums: list[float], counts: GlobalCounts, *, with_metrics: bool) -> dict[str, float]:
    """Return the metrics of the output-space objective from the global sums [1 + METRICS]; without `with_metrics`, the
    loss alone."""
    tokens = max(counts.tokens, 1)
    others = {f"output/{name}": value / tokens for name, value in zip(METRICS, sums[1:], strict=True)}
    return {"output/loss": sums[0]} | (others if with_metrics else {})
