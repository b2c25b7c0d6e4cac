"""Choose the size of a micro-batch from the memory of an update at two sizes and the operations of a step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.config import with_settings
from megatron_oprd.launch.inputs import TOKENS
from megatron_oprd.launch.setup import DEFAULT_TOKENS
from megatron_oprd.planning.flops import linear_flops
from megatron_oprd.planning.memory_plan import training_bytes
from megatron_oprd.planning.peak_memory import in_workers, predict_peaks, rank_groups
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.recompute_options import blocks_of_rank, forward_operations, recompute_options
from megatron_oprd.planning.recompute_search import SearchJob, stage_memory
from megatron_oprd.planning.step_time import bubble

# A micro-batch reads and writes the gradient of each weight: 12 bytes. A GPU computes so much while it moves one byte.
OPERATIONS_PER_WEIGHT = 12 * 190


@dataclass(frozen=True)
class RankOptions:
    """The options of one rank, the cheapest first."""

    rank: int  # pipeline rank
    # Of each option: the operations that a sequence repeats, and the bytes of the process for one and two sequences.
    options: tuple[tuple[float, float, float], ...]

    def repeated(self, sequences: int, limit: float) -> float | None:
        """Return the operations that the first fitting option repeats, or None if none fits."""
        fitting = (again for again, one, two in self.options if one + (two - one) * (sequences - 1) <= limit)
        return next(fitting, None)


def choose_tokens(run: PlannedRun, device: PlanDevice, limit: float, *, any_recomputation: bool) -> int:
    """Return the size of a micro-batch with the shortest estimated step, in tokens.

    Candidates are multiples of the longest sequence, up to the default size. Memory is traced for one and two
    sequences and linear between and beyond them.

    Args:
        run: The run.
        device: The planned device.
        limit: The bytes of a process.
        any_recomputation: True if the recomputation is chosen too; False: it is that of the configuration.
    """
    longest, parallel = run.lengths.sequence, run.config.parallel
    replicas = run.setup.world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    rollouts = math.ceil(run.rollouts_per_step / replicas)
    most = min(rollouts, max(DEFAULT_TOKENS // longest, 1)) if run.config.batch.packing else 1
    if most == 1:
        return longest
    ranks = (_all_options if any_recomputation else _given_recomputation)(run, device)
    times: dict[int, float] = {}
    for sequences in range(1, most + 1):
        repeated = [rank.repeated(sequences, limit) for rank in ranks]
        if None not in repeated:
            times[sequences] = _step_operations(run, sequences, math.ceil(rollouts / sequences), ranks, repeated)
    return longest * min(times, key=times.__getitem__, default=1)


def _step_operations(
    run: PlannedRun, sequences: int, micro_batches: int, ranks: Sequence[RankOptions], repeated: Sequence[float | None]
) -> float:
    """Return the time of the student's passes on the slowest rank, in operations.

    Backward has 2.5 times the operations of the forward pass. Idle time of a pipeline counts.
    """
    spec = run.setup.student

    def of_rank(rank: int, again: float) -> float:
        blocks = [layer for chunk in blocks_of_rank(run, rank) for layer in chunk]
        weights = sum(linear_flops(spec, layer) for layer in blocks) / 2
        return sequences * (3.5 * forward_operations(run, rank) + again) + OPERATIONS_PER_WEIGHT * weights

    slowest = max(of_rank(one.rank, again or 0.0) for one, again in zip(ranks, repeated, strict=True))
    return micro_batches * slowest * (1 + bubble(run.config.parallel, micro_batches))


def _with_sequences(run: PlannedRun, sequences: int) -> PlannedRun:
    config = with_settings(run.config, {TOKENS: sequences * run.lengths.sequence})
    return dataclasses.replace(run, config=config)


def _all_options(run: PlannedRun, device: PlanDevice) -> list[RankOptions]:
    """Return every option of each group of ranks."""
    firsts = [group.start for group in rank_groups(run)]
    jobs = [SearchJob(_with_sequences(run, count), device, rank) for rank in firsts for count in (1, 2)]
    memories = in_workers(stage_memory, jobs)
    found = []
    for job, one, two in zip(jobs[::2], memories[::2], memories[1::2], strict=True):
        options = []
        for option in recompute_options(run, job.pipeline_rank):
            bytes_of_both = one.estimate(option.recomputation), two.estimate(option.recomputation)
            options.append((option.operations, *bytes_of_both))
        found.append(RankOptions(job.pipeline_rank, tuple(options)))
    return found


def _given_recomputation(run: PlannedRun, device: PlanDevice) -> list[RankOptions]:
    """Return the recomputation of the configuration as the only option of each group of ranks."""
    one, two = (predict_peaks(_with_sequences(run, count)) for count in (1, 2))
    pipeline, world = run.config.parallel.pipeline, run.setup.world_size
    return [
        RankOptions(
            group.start * pipeline // world,
            ((0.0, training_bytes(peak, run.config, device), training_bytes(two[group], run.config, device)),),
        )
        for group, peak in one.items()
    ]
