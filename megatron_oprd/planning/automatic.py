"""Choose values for `recompute: auto` and `batch.max_tokens_per_micro_batch: auto` from traces of an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_oprd.config import Config, with_settings
from megatron_oprd.launch.inputs import RECOMPUTE, TOKENS, Inputs
from megatron_oprd.losses.lm_head import auto_chunk_tokens
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.recompute import Recomputation
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import collective_timeout, start_process
from megatron_oprd.planning.automatic_tokens import choose_tokens
from megatron_oprd.planning.peak_memory import NotTraced, in_workers, rank_groups
from megatron_oprd.planning.plan_device import PlanDevice, plan_device
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.recompute_options import forward_operations
from megatron_oprd.planning.recompute_search import Measured, SearchJob, StageChoice, search_recomputation
from megatron_oprd.runtime import platform
from megatron_oprd.runtime.readable import significant
from megatron_oprd.types import UserError

CHUNK = "loss.output.chunk_tokens"
# Repeating a block is cheaper for each byte than more passes over the LM heads, so these follow all recomputation.
SMALLER_CHUNKS = (1024, 512, 256)


@dataclass(frozen=True)
class Automatic:
    """The values that were chosen for the keys with `auto`."""

    inputs: Inputs  # with these values
    settings: Mapping[str, Any]  # by dotted key
    stages: Sequence[StageChoice]  # of each pipeline rank; empty if the recomputation was given
    device: PlanDevice

    @property
    def limit(self) -> int:
        """Return the bytes of a process that a choice may need."""
        return limit_bytes(self.inputs.config, self.device)

    def lines(self) -> Iterator[str]:
        """Yield the choice, and the next cheaper one, which does not fit."""
        if TOKENS in self.settings:
            yield f"micro-batches of up to {self.settings[TOKENS]:,} tokens"
        if CHUNK in self.settings:
            yield f"logits of {self.settings[CHUNK]:,} tokens at a time"
        for rank, stage in enumerate(self.stages):
            where = f"pipeline rank {rank}: " if len(self.stages) > 1 else ""
            allowed = f"{_gb(self.limit)} GB allowed"
            fits = allowed if stage.fits else f"more than the {allowed}; no other choice needs less"
            yield f"{where}recompute {self._choice(rank, stage.chosen)}: {_gb(stage.chosen.needed)} GB, {fits}"
            if stage.cheaper is not None and stage.fits:
                cheaper = stage.cheaper
                yield f"{where}next cheaper: {self._choice(rank, cheaper)}: {_gb(cheaper.needed)} GB, does not fit"

    def _choice(self, rank: int, measured: Measured) -> str:
        repeated = measured.option.operations / (forward_operations(PlannedRun.of(self.inputs), rank) or 1)
        share = f" ({repeated:.0%} of a forward pass again)" if measured.option.operations else ""
        return in_words(measured.option.recomputation) + share


def in_words(recomputation: Recomputation) -> str:
    """Return a recomputation as text for the user."""
    names = " and ".join(sorted(recomputation.parts))
    blocks = f"the first {recomputation.blocks} blocks" if recomputation.blocks else ""
    if names and blocks:
        return f"{blocks}, and {names} of the others"
    return blocks or (f"{names} of every block" if names else "nothing")


def limit_bytes(config: Config, device: PlanDevice) -> int:
    """Return the bytes of a process that an automatic choice may need on a device."""
    given = config.memory.limit_gb
    total = device.memory // device.sharers if given is None else int(given * 1e9)
    return int(total * (1 - config.memory.margin))


def choose_automatic(inputs: Inputs, device: PlanDevice) -> Automatic:
    """Choose the values. Takes seconds to minutes of CPU time in worker processes. No communication.

    Raises UserError if an update cannot be traced.
    """
    config = inputs.config
    settings: dict[str, Any] = {}
    limit = limit_bytes(config, device)
    stages: list[StageChoice] = []
    try:
        if TOKENS in inputs.automatic:
            settings[TOKENS] = choose_tokens(
                PlannedRun.of(inputs), device, limit, any_recomputation=RECOMPUTE in inputs.automatic
            )
            config = with_settings(config, settings)
        if RECOMPUTE in inputs.automatic:
            run = dataclasses.replace(PlannedRun.of(inputs), config=config)
            stages = choose_recomputation(run, device, limit)
            if not stages[-1].fits:
                chunk, stages = _with_smaller_chunks(run, device, limit, stages)
                settings |= chunk
            chosen = [stage.chosen.option.recomputation for stage in stages]
            if any(one.parts or one.blocks for one in chosen):
                settings["recompute.stages"] = [{"parts": sorted(one.parts), "blocks": one.blocks} for one in chosen]
    except NotTraced as error:
        raise UserError(
            f"an update could not be traced to choose {' and '.join(sorted(inputs.automatic))} ({error}); set values "
            "in place of auto"
        ) from None
    config = with_settings(inputs.config, settings)
    chosen_inputs = dataclasses.replace(inputs, config=config, automatic=frozenset())
    return Automatic(chosen_inputs, settings, stages, device)


def _with_smaller_chunks(
    run: PlannedRun, device: PlanDevice, limit: int, stages: list[StageChoice]
) -> tuple[Mapping[str, Any], list[StageChoice]]:
    """Return the largest of SMALLER_CHUNKS with which the last pipeline rank fits, and the recomputation with it.

    Returns no setting and `stages` if the size of a chunk is given, or none suffices.
    """
    if not run.config.loss.reads_output or run.config.loss.output.chunk_tokens != "auto":
        return {}, stages
    for tokens in smaller_chunks(run):
        setting = {CHUNK: tokens}
        smaller = dataclasses.replace(run, config=with_settings(run.config, setting))
        found = choose_recomputation(smaller, device, limit, first=len(stages) - 1)  # other ranks have no logits
        if found[-1].fits:
            return setting, [*stages[:-1], *found]
    return {}, stages


def smaller_chunks(run: PlannedRun) -> list[int]:
    """Return the sizes of SMALLER_CHUNKS below the size that `auto` has without them, in tokens."""
    chunk_tokens = auto_chunk_tokens(run.lm_head_rows, DTYPES[run.config.precision.dtype])
    return [size for size in SMALLER_CHUNKS if size < chunk_tokens]


def choose_recomputation(run: PlannedRun, device: PlanDevice, limit: int, first: int = 0) -> list[StageChoice]:
    """Return the choice for each pipeline rank from `first` on: of its ranks, the one that repeats most."""
    jobs = [SearchJob(run, device, group.start, limit) for group in rank_groups(run)]
    jobs = [job for job in jobs if job.pipeline_rank >= first]
    found: dict[int, StageChoice] = {}
    for job, choice in zip(jobs, in_workers(search_recomputation, jobs), strict=True):
        other = found.setdefault(job.pipeline_rank, choice)
        found[job.pipeline_rank] = max(other, choice, key=lambda one: one.chosen.option.operations)
    return [found[rank] for rank in sorted(found)]


def settle(inputs: Inputs) -> Inputs:
    """Return the inputs of a training run with values in place of `auto`, and print the choice.

    Rank 0 chooses. Collective over the world if there is a key with `auto`.
    """
    if not inputs.automatic:
        return inputs
    start_process(platform.choose_device(inputs.config.train.device), collective_timeout(inputs.config.watchdog))

    def choose() -> Mapping[str, Any]:
        automatic = choose_automatic(inputs, plan_device(None, "", inputs.setup, inputs.config))
        print(f"auto: {'; '.join(automatic.lines())}", flush=True)
        return automatic.settings

    config = with_settings(inputs.config, on_rank_zero(choose))
    return dataclasses.replace(inputs, config=config, automatic=frozenset())


def _gb(size: float) -> str:
    return significant(size / 1e9, 3)
