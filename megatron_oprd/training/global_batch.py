"""This rank's micro-batches of the global batch, and the counts over all of it."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.config import RepresentationConfig
from megatron_oprd.data.packing import empty_batch, pack, selected_per_rollout, to_device
from megatron_oprd.losses.reduction import count
from megatron_oprd.parallel.collectives import max_over, sum_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import GlobalCounts, PackedBatch, Rollout


def pack_global_batch(
    rollouts: Sequence[Rollout],
    config: RepresentationConfig,
    topology: Topology,
    max_tokens_per_micro_batch: int,
) -> tuple[list[PackedBatch], GlobalCounts]:
    """Micro-batches of this data-parallel rank's rollouts, as many as on every other rank, and the global counts.

    Communicates over the data-parallel group: lengths only. Raises UserError for a rollout that does not fit.
    """
    local = count(selected_per_rollout(rollouts, config))
    sums = sum_over([local.sequences, local.tokens, local.empty], topology.groups.dp, topology.device)
    counts = GlobalCounts(*(int(value) for value in sums))
    batches = pack(rollouts, config, counts, max_tokens_per_micro_batch=max_tokens_per_micro_batch)
    (most,) = max_over([max(len(batches), 1)], topology.groups.dp, topology.device)
    batches += [empty_batch()] * (int(most) - len(batches))
    return [to_device(batch, topology.device) for batch in batches], counts


def rollout_metrics(rollouts: Sequence[Rollout], counts: GlobalCounts, topology: Topology) -> dict[str, float]:
    """Lengths of the responses of the global batch. Communicates over the data-parallel group."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
    total, tokens, cut = sum_over([len(lengths), sum(lengths), truncated], topology.groups.dp, topology.device)
    (longest,) = max_over([max(lengths, default=0)], topology.groups.dp, topology.device)
    return {
        "rep/num_tokens": counts.tokens,
        "rollout/length_mean": tokens / max(total, 1),
        "rollout/length_max": longest,
        "rollout/truncated_fraction": cut / max(total, 1),
        "rollout/empty_count": counts.empty,
    }
