"""Assign sequences to the micro-batches of the data-parallel ranks. No communication."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.types import UserError


def sequence_cost(tokens: int, spec: ModelSpec) -> float:
    """Return the multiply-adds of one layer on a sequence, causal attention included. Only ratios matter."""
    heads = spec.num_attention_heads * spec.head_dim
    attention = spec.hidden_size * (2 * heads + 2 * spec.num_query_groups * spec.head_dim)
    sparse = len(spec.sparse_layers) / spec.num_layers
    experts = spec.experts_per_token * spec.moe_ffn_hidden_size + spec.shared_ffn_hidden_size
    ffn = sparse * experts + (1 - sparse) * spec.ffn_hidden_size
    unseen = max(tokens - spec.sliding_window, 0) ** 2 * len(spec.windowed_layers) / spec.num_layers
    return tokens * (attention + 3 * spec.hidden_size * ffn) + (tokens**2 - unseen) * heads


def assign(
    lengths: Sequence[int],
    costs: Sequence[float],
    ranks: int,
    max_tokens: int,
    *,
    multiple: int = 1,
    packing: bool = True,
) -> list[list[list[int]]]:
    """Distribute sequences evenly, by cost, over ranks and over the micro-batches of each rank.

    Args:
        lengths: tokens of each sequence.
        costs: cost of each sequence.
        ranks: number of data-parallel ranks.
        max_tokens: the most tokens of a micro-batch.
        multiple: the number of micro-batches of a rank is a multiple of this.
        packing: False puts at most one sequence into a micro-batch.

    Returns: [rank][micro-batch] -> ascending indices of sequences. Every rank has the same number of micro-batches, at
    least one; some may be empty. The result depends on the arguments alone.

    Raises:
        UserError: a sequence has more than `max_tokens` tokens.
    """
    longest = max(lengths, default=0)
    if longest > max_tokens:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={max_tokens} is less than a rollout of {longest} tokens; raise it or "
            "lower rollout.max_new_tokens"
        )
    order = sorted(range(len(lengths)), key=lambda index: (-costs[index], index))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for index in order:
        rank = load.index(min(load))
        shares[rank].append(index)
        load[rank] += costs[index]
    capacity = max_tokens if packing else 0
    fewest = [_first_fit(share, lengths, capacity) for share in shares]
    count = max(1, *(len(bins) for bins in fewest))
    count += -count % multiple
    return [
        [sorted(members) for members in _spread(share, lengths, costs, count, capacity) or _fill_up(bins, count)]
        for share, bins in zip(shares, fewest, strict=True)
    ]


def _first_fit(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(order, key=lambda index: -lengths[index]):
        place = next((i for i, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= lengths[index]
    return bins


def _spread(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], count: int, capacity: int
) -> list[list[int]] | None:
    """Put each sequence, most expensive first, into the cheapest micro-batch with room; None if one finds no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room = [capacity] * count
    load = [0.0] * count
    for index in order:
        open_bins = [i for i in range(count) if room[i] >= lengths[index] or not bins[i]]
        if not open_bins:
            return None
        place = min(open_bins, key=lambda i: load[i])
        bins[place].append(index)
        room[place] -= lengths[index]
        load[place] += costs[index]
    return bins


def _fill_up(bins: list[list[int]], count: int) -> list[list[int]]:
    return bins + [[] for _ in range(count - len(bins))]
