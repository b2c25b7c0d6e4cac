"""The global batch: every rank knows all of its token ids, and packs the part that it works on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from megatron_oprd.config import BatchConfig, RepresentationConfig
from megatron_oprd.data.balance import assign, sequence_cost
from megatron_oprd.data.cutting import cut
from megatron_oprd.data.packing import num_tokens, pack, selected_per_rollout, to_device
from megatron_oprd.losses.reduction import count
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import GlobalCounts, ModelSpec, PackedBatch, Rollout


def share_rollouts(mine: Sequence[Rollout], topology: Topology) -> list[Rollout]:
    """The rollouts of all replicas, in the order of their ranks, on every rank. Token ids are light beside what is
    computed from them, and with all of them every layout is a matter of arithmetic. Communicates over the data- and
    context-parallel group."""
    return [rollout for part in gather_objects(list(mine), topology.groups.dp_cp) for rollout in part]


def pack_global_batch(
    rollouts: Sequence[Rollout],
    config: RepresentationConfig,
    batch: BatchConfig,
    spec: ModelSpec,
    topology: Topology,
) -> tuple[list[PackedBatch], GlobalCounts]:
    """This rank's micro-batches of the global batch in a layout, as many as on every other rank, and the global counts.

    The cost of `spec`'s blocks is spread evenly over data-parallel ranks and micro-batches. Rollouts without a selected
    token contribute nothing and are left out. The order of `rollouts` numbers the selected tokens: it is the same for
    every layout. No communication. Raises UserError for a rollout that does not fit.
    """
    selected = selected_per_rollout(rollouts, config)
    counts = count(selected)
    first_rows = list(itertools.accumulate(selected, initial=0))
    useful = [number for number, tokens in enumerate(selected) if tokens]
    lengths = [num_tokens(rollouts[number]) for number in useful]
    shares = assign(
        lengths,
        [sequence_cost(length, spec) for length in lengths],
        topology.data_size,
        batch.max_tokens_per_micro_batch,
        multiple=topology.pipeline_size if topology.virtual_size > 1 else 1,  # the interleaved schedule's rounds
        packing=batch.packing,
    )
    sequence_multiple = 2 * topology.context_size if topology.context_size > 1 else 1
    sequence_size = topology.tensor_size if topology.sequence_parallel else 1
    batches = []
    for members in shares[topology.data_rank]:
        numbers = [useful[member] for member in members]
        whole = pack(
            [rollouts[number] for number in numbers],
            [first_rows[number] for number in numbers],
            config,
            counts,
            sequence_multiple=sequence_multiple,
            batch_multiple=sequence_multiple * sequence_size,
        )
        part = cut(
            whole,
            context_rank=topology.context_rank,
            context_size=topology.context_size,
            sequence_rank=topology.tensor_rank if topology.sequence_parallel else 0,
            sequence_size=sequence_size,
        )
        batches.append(to_device(part, topology.device))
    return batches, counts


def rollout_metrics(rollouts: Sequence[Rollout], counts: GlobalCounts) -> dict[str, float]:
    """Lengths of the responses of the global batch. No communication."""
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    truncated = sum(rollout.finish_reason == "length" for rollout in rollouts)
    total = max(len(lengths), 1)
    return {
        "rep/num_tokens": counts.tokens,
        "rollout/length_mean": sum(lengths) / total,
        "rollout/length_max": max(lengths, default=0),
        "rollout/truncated_fraction": truncated / total,
        "rollout/empty_count": counts.empty,
    }
