"""The only file that sums, divides and weighs.

The loss is a mean over the whole global batch, so every divisor is known before the first forward: it comes from
lengths, which every rank knows. Each selected token then has a constant weight and every partial result
is a plain sum of weight * e: nothing depends on the cut into micro-batches, ranks or shards.

What Megatron multiplies on the way, and how each factor is kept at one:
- schedules divide the loss by the number of micro-batches, unless `calculate_per_token_loss`: it is set;
- DDP scales gradients by 1 / (data- x context-parallel size), unless `calculate_per_token_loss`: it is set, so DDP
  sums over data- and context-parallel ranks, and experts' gradients over the ranks that hold the same experts;
- `finalize_model_grads` sums the gradients of what sequence-parallel ranks hold alike (norms, routers) and divides by
  the number of tokens it is given: `training/student.py` gives it none;
- the optimizer's gradient scale is one for bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from megatron_oprd.losses.output_space import METRICS, TokenObjective
from megatron_oprd.losses.representation import TokenStatistics
from megatron_oprd.types import GlobalCounts


def count(selected_per_sequence: Iterable[int]) -> GlobalCounts:
    """Counts of some sequences from how many tokens each has selected. No communication."""
    lengths = list(selected_per_sequence)
    return GlobalCounts(sequences=sum(length > 0 for length in lengths), tokens=sum(lengths))


def token_weight(selected: int, counts: GlobalCounts, aggregation: str) -> float:
    """Weight of each of a sequence's `selected` tokens in AGG of OPRD eq. (6).

    sequence_mean: 1 / (non-empty sequences * selected); token_mean: 1 / (all selected tokens).
    """
    if aggregation == "sequence_mean":
        return 1.0 / (counts.sequences * selected)
    if aggregation == "token_mean":
        return 1.0 / counts.tokens
    raise ValueError(f"unknown aggregation {aggregation!r}")


def layer_weights(weights: torch.Tensor, num_layers: int) -> torch.Tensor:
    """Token weights with the mean over layers of L_rep in them."""
    return weights / num_layers


def layer_sums(statistics: TokenStatistics, weights: torch.Tensor) -> torch.Tensor:
    """Partial sums [4] in float64 of one layer on one micro-batch: AGG of e (`weights` without the layer mean), then
    plain sums of cosine, student norm and teacher norm. They add up over micro-batches and ranks."""
    error = (weights.double() * statistics.error.double()).sum()
    rest = (statistics.cosine, statistics.student_norm, statistics.teacher_norm)
    return torch.stack([error, *(value.double().sum() for value in rest)])


def layer_metrics(sums: dict[int, list[float]], counts: GlobalCounts) -> dict[str, float]:
    """Metrics per layer and as a mean over layers from the global sums [4] of each student layer."""
    tokens = max(counts.tokens, 1)
    per_layer = {layer: [values[0], *(value / tokens for value in values[1:])] for layer, values in sums.items()}
    metrics: dict[str, float] = {}
    for position, name in enumerate(("mse", "cosine", "student_norm", "teacher_norm")):
        metrics[f"rep/{name}"] = sum(values[position] for values in per_layer.values()) / len(per_layer)
        metrics |= {f"rep/{name}/layer_{layer}": values[position] for layer, values in per_layer.items()}
    return metrics


def output_sums(tokens: TokenObjective, weights: torch.Tensor) -> torch.Tensor:
    """Partial sums [1 + METRICS] in float64 of the output-space objective on some tokens: AGG of its value, then plain
    sums of the metrics, zeros where they were not asked for. They add up over chunks, micro-batches and ranks."""
    value = (weights.double() * tokens.value.double()).sum()[None]
    if tokens.metrics is None:
        return torch.cat((value, value.new_zeros(len(METRICS))))
    return torch.cat((value, tokens.metrics.double().sum(0)))


def output_metrics(sums: list[float], counts: GlobalCounts, *, with_metrics: bool) -> dict[str, float]:
    """Metrics of the output-space objective from the global sums [1 + METRICS]: its value always."""
    tokens = max(counts.tokens, 1)
    others = {f"output/{name}": value / tokens for name, value in zip(METRICS, sums[1:], strict=True)}
    return {"output/loss": sums[0]} | (others if with_metrics else {})
