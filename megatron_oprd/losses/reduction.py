"""The only file that sums, divides and weighs.

The loss is a mean over the whole global batch, so every divisor is known before the first forward: it comes from
lengths, summed once over data-parallel ranks. Each selected token then has a constant weight and every partial result
is a plain sum of weight * e: nothing depends on the cut into micro-batches, ranks or shards.

What Megatron multiplies on the way, and how each factor is kept at one:
- schedules divide the loss by the number of micro-batches, unless `calculate_per_token_loss`: it is set;
- DDP scales gradients by 1 / data-parallel size, unless `calculate_per_token_loss`: it is set, so DDP sums;
- `finalize_model_grads` divides by the number of tokens it is given: it is given none;
- the optimizer's gradient scale is one for bf16 and fp32.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_oprd.types import GlobalCounts


def count(selected_per_sequence: Iterable[int]) -> GlobalCounts:
    """Counts of some sequences from how many tokens each has selected. No communication."""
    lengths = list(selected_per_sequence)
    return GlobalCounts(
        sequences=sum(length > 0 for length in lengths),
        tokens=sum(lengths),
        empty=sum(length == 0 for length in lengths),
    )


def token_weight(selected: int, counts: GlobalCounts, aggregation: str) -> float:
    """Weight of each of a sequence's `selected` tokens in AGG of OPRD eq. (6).

    sequence_mean: 1 / (non-empty sequences * selected); token_mean: 1 / (all selected tokens).
    """
    if aggregation == "sequence_mean":
        return 1.0 / (counts.sequences * selected)
    if aggregation == "token_mean":
        return 1.0 / counts.tokens
    raise ValueError(f"unknown aggregation {aggregation!r}")
