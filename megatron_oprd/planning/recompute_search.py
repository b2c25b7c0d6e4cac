"""Find the recomputation that repeats the fewest operations and with which an update fits into given memory.

Memory is linear in the blocks that store their activations: two traces give the bytes that a block stores with each
set of parts, all other options are estimated from them, and the choice is traced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.models.recompute import Recomputation
from megatron_oprd.planning.memory_plan import training_bytes
from megatron_oprd.planning.peak_memory import fullest_micro_batch
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.recompute_options import NOTHING, Option, blocks_of_rank, part_sets, recompute_options
from megatron_oprd.planning.update_trace import TracedUpdate, traced_update

MOST_TRACES = 12  # of the search, after the first two
DOUBT = 0.1  # error of an estimate for parts that were not measured, as a part of what recomputation can save


@dataclass(frozen=True)
class Measured:
    """An option and the bytes of the process in an update with it."""

    option: Option
    needed: int


@dataclass(frozen=True)
class StageChoice:
    """The choice for one pipeline rank."""

    chosen: Measured
    cheaper: Measured | None  # the next cheaper option, which does not fit; None: nothing is recomputed
    fits: bool


@dataclass(frozen=True)
class StageMemory:
    """The memory of one pipeline rank without recomputation, and what each option saves."""

    needed: int  # bytes of the process in an update without recomputation
    stored: Mapping[frozenset[str] | None, float]  # by set of parts: bytes that a block stores; None: its input alone
    blocks: tuple[int, ...]  # of each chunk
    copies: float  # micro-batches whose activations are in memory at the peak

    def estimate(self, recomputation: Recomputation) -> float:
        """Return the estimated bytes of the process in an update."""
        complete = sum(min(blocks, recomputation.blocks) for blocks in self.blocks)
        others = sum(self.blocks) - complete
        saved = complete * (self.stored[NOTHING] - self.stored[None])
        saved += others * (self.stored[NOTHING] - self.stored[recomputation.parts])
        return self.needed - self.copies * saved


@dataclass(frozen=True)
class SearchJob:
    """The run, the device and the rank for which a recomputation is searched."""

    run: PlannedRun
    device: PlanDevice
    rank: int
    limit: float = 0.0  # bytes of the process

    @property
    def pipeline_rank(self) -> int:
        return self.rank * self.run.config.parallel.pipeline // self.run.setup.world_size


def stage_memory(job: SearchJob) -> StageMemory:
    """Trace an update of a rank and return what each option saves. Takes seconds; call it in a worker process."""
    with _update_of(job) as update:
        return _stage_memory(job, update)


def traced_memory(job: SearchJob) -> tuple[list[Option], list[int], StageMemory]:
    """Trace an update with every option: return the options, the bytes of the process with each, and `stage_memory`."""
    with _update_of(job) as update:
        options = recompute_options(job.run, job.pipeline_rank)
        sizes = [
            training_bytes(update.footprint(option.recomputation), job.run.config, job.device) for option in options
        ]
        return options, sizes, _stage_memory(job, update)


def search_recomputation(job: SearchJob) -> StageChoice:
    """Trace updates of a rank and return its choice. Takes seconds; call it in a worker process."""
    with _update_of(job) as update:
        options = recompute_options(job.run, job.pipeline_rank)

        def measure(recomputation: Recomputation) -> int:
            return training_bytes(update.footprint(recomputation), job.run.config, job.device)

        needed = measure(options[0].recomputation)
        if needed <= job.limit:
            return StageChoice(Measured(options[0], needed), None, fits=True)
        return search(options, measure, _stage_memory(job, update, needed), job.limit)


def search(
    options: Sequence[Option], measure: Callable[[Recomputation], int], memory: StageMemory, limit: float
) -> StageChoice:
    """Return the first of the options that fits, measured, and the one before it. `options[0]` recomputes nothing.

    Estimates are too low where backward holds again what the highest block does not store, by the same amount for all
    options with the same parts. If none fits, the choice is the one that needs the least memory.
    """
    parts = [option.recomputation.parts for option in options]
    estimates = [memory.estimate(option.recomputation) for option in options]
    known = {0: memory.needed}
    above: dict[frozenset[str], float] = {}  # by set of parts: the last measurement minus its estimate

    def expected(number: int) -> float:
        return known.get(number, estimates[number] + above.get(parts[number], 0.0))

    margin = DOUBT * (memory.needed - min(estimates))

    def doubtful(number: int) -> bool:
        """Return True for an option of unmeasured parts that may fit although its estimate does not."""
        return number not in known and parts[number] not in above and estimates[number] <= limit + margin

    for _ in range(MOST_TRACES):
        candidates = [number for number in range(len(options)) if expected(number) <= limit]
        pick = min(candidates, default=min(range(len(options)), key=expected))
        if pick in known:
            # The next cheaper one is measured too: it must not fit. So are cheaper ones that may fit.
            cheaper = [number for number in (pick - 1, *filter(doubtful, range(pick))) if number not in known]
            pick = next(iter(cheaper), -1)
            if pick < 0:
                break
        known[pick] = measure(options[pick].recomputation)
        above[parts[pick]] = known[pick] - estimates[pick]
    fitting = [number for number, needed in known.items() if needed <= limit]
    best = min(fitting) if fitting else min(known, key=known.__getitem__)
    measured = {number: Measured(options[number], needed) for number, needed in known.items()}
    return StageChoice(measured[best], measured.get(best - 1), fits=bool(fitting))


def _update_of(job: SearchJob) -> contextlib.AbstractContextManager[TracedUpdate]:
    torch.set_num_threads(1)
    rollouts, count = fullest_micro_batch(job.run)
    return traced_update(job.run, rollouts, rank=job.rank, micro_batches=count)


def _stage_memory(job: SearchJob, update: TracedUpdate, needed: int | None = None) -> StageMemory:
    """Return the memory of a traced rank. `needed`: without recomputation, if the last trace had none."""

    def measure(recomputation: Recomputation, parts: Mapping[int, frozenset[str]]) -> int:
        return training_bytes(update.footprint(recomputation, parts), job.run.config, job.device)

    if needed is None:
        needed = measure(Recomputation(), {})
    plain, chunks = update.stored, tuple(map(len, blocks_of_rank(job.run, job.pipeline_rank)))
    stored: dict[frozenset[str] | None, float] = {NOTHING: sum(plain) / max(sum(chunks), 1)}
    missing: list[frozenset[str]] = [parts for parts in part_sets(job.run) if parts]
    copies = 1.0
    # One trace, unless the rank has fewer blocks than there are sets of parts.
    while sum(chunks) and (None not in stored or missing):
        first = 0 if None in stored else 1
        chunk = max(range(len(chunks)), key=chunks.__getitem__)
        start = sum(len(chunk.decoder.layers) for chunk in update.models.student.stage[:chunk])
        parts = dict(zip(range(start + first, start + chunks[chunk]), missing, strict=False))
        peak = measure(Recomputation(blocks=first), parts)
        if first:
            stored[None] = update.stored[start]
        stored.update({names: update.stored[number] for number, names in parts.items()})
        missing = missing[len(parts) :]
        freed = sum(plain) - sum(update.stored)
        copies = max(copies, (needed - peak) / freed if freed > 0 else 1.0)
    return StageMemory(needed, stored, chunks, copies)
