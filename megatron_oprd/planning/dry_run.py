"""Print what a configuration would run, without running it: first whether it fits, then the run, memory and time."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from megatron_oprd.config import changed_keys
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.run_summary import plan_facts
from megatron_oprd.planning.advice import find_change
from megatron_oprd.planning.automatic import choose_automatic
from megatron_oprd.planning.details import detail_lines
from megatron_oprd.planning.evaluation_plan import evaluation_seconds
from megatron_oprd.planning.memory_plan import EVALUATES, GENERATES, SAVES, MemoryPlan, plan_memory
from megatron_oprd.planning.plan_device import PlanDevice
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_report import rollout_lines
from megatron_oprd.planning.step_time import Estimate, estimate_step
from megatron_oprd.runtime.readable import duration, significant

COLUMNS = 100
NOT_SHOWN = ("student.path", "teacher.path", "train.run_dir", "loss.representation.pairs")  # in lines of their own
PURPOSES = ("weights", "gradients", "optimizer", "teacher", "targets", "activations")  # the fields of a Footprint


def describe_run(inputs: Inputs, device: PlanDevice, *, details: bool = False) -> None:
    """Print the plan of a run on a device. Of several processes, only rank 0 may call this. No communication.

    `details`: also print the complete configuration, each pair of layers, and the cost of each part of a step.
    """
    chosen_keys = inputs.automatic
    automatic = choose_automatic(inputs, device) if chosen_keys else None
    inputs = inputs if automatic is None else automatic.inputs
    run = PlannedRun.of(inputs)
    memory = plan_memory(run, device)
    for line in answer(inputs, memory, chosen_keys):
        print(line)
    if automatic is not None:
        for number, line in enumerate(automatic.lines()):
            print(f"{'' if number else 'auto':<10} {line}")
    print()
    print(*_facts(inputs), sep="\n")
    print(*_memory_table(memory), sep="\n")
    estimate = None if device.hardware is None else estimate_step(run, device.hardware)
    if estimate is None:
        print(f"\ntime       not estimated: the rates of {device.name} are unknown")
    else:
        print(*_time(estimate, device.kind), sep="\n")
        seconds = evaluation_seconds(run, estimate.hardware)
        if seconds is not None:
            every = run.config.evaluation.every
            print(f"           beside it an evaluation every {every} steps: the student answers in {duration(seconds)}")
    if not details:
        print("\n--details prints every key, pair of layers and cost; docs/scaling.md explains the figures.")
        return
    print()
    for line in detail_lines(run, estimate):
        print(line)
    for line in rollout_lines(run, device.hardware) if device.hardware is not None else ():
        print(line)


def answer(inputs: Inputs, memory: MemoryPlan, chosen: Collection[str] = ()) -> Iterator[str]:
    """Yield the lines that say whether the run fits, and what to change if it does not. Plans each change.

    `chosen`: the keys of `inputs` whose values were chosen for `auto`.
    """
    device = memory.device
    alone = memory.world_size == 1
    group = next(ranks for ranks in memory.peaks if memory.fullest[0] in ranks)
    where = device.name if alone or device.kind == "cpu" else f"{_ranks(group)}, {device.name}"
    needed, size = gigabytes(memory.needed), gigabytes(device.memory)
    if memory.fits:
        yield f"fits       {needed} of {size} GB, {memory.phase}: {where}"
        if memory.needed > device.free:
            yield f"but        other programs use memory: only {gigabytes(device.free)} GB are free now"
    else:
        yield f"too large  {needed} GB are needed {memory.phase}, and there are {size} GB: {where}"
        change = find_change(inputs, memory, chosen)
        if change is not None:
            yield f"change     {' '.join(_settings(change.settings))}"
            yield f"           then {gigabytes(change.memory.needed)} of {size} GB (planned again)"
        else:
            more = "a GPU (--device h100)" if device.kind == "cpu" else "more GPUs"
            yield f"change     no setting that was planned suffices; take smaller models or {more}"
            yield f"           (without activations and rollouts a process has {gigabytes(memory.lasting)} GB)"
    if device.why:
        yield f"           planned for {device.name}: {device.why}"


def gigabytes(size: int) -> str:
    """Return bytes in GB (10^9 bytes) with three significant digits."""
    if 0 < size < 10**6:
        return "<0.001"
    return significant(size / 1e9, 3) if size else "0"


def _settings(settings: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def _facts(inputs: Inputs) -> Iterator[str]:
    keys = {key: value for key, value in changed_keys(inputs.config).items() if key not in NOT_SHOWN}
    facts = [*plan_facts(inputs), ("settings", "  ".join(_settings(keys)))]
    facts += [("unchecked", line) for line in inputs.missing.lines(inputs.config)]
    for heading, text in facts:
        yield from textwrap.wrap(
            text,
            COLUMNS,
            initial_indent=f"{heading:<10} ",
            subsequent_indent=" " * 11,
            break_on_hyphens=False,
            break_long_words=False,  # a key or a path stays whole, to be copied
        )


def _memory_table(memory: MemoryPlan) -> Iterator[str]:
    """Yield the memory of one process of each group of ranks."""
    device, several = memory.device, memory.device.sharers > 1
    yield ""
    yield f"memory of {'each' if several else 'a'} process in an update, GB"
    rows = [("ranks", *PURPOSES, "process", "sum")]
    for ranks, footprint in memory.peaks.items():
        parts = [*dataclasses.astuple(footprint), device.process_bytes]
        rows.append((_ranks(ranks).split()[1], *map(gigabytes, [*parts, sum(parts)])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)).rstrip()
    if memory.not_traced:
        yield f"by formula, because the update could not be traced: {memory.not_traced}"
    for phase, cache in ((GENERATES, memory.cache), (EVALUATES, memory.evaluation_cache)):
        if cache is None:
            continue
        turns = "" if cache.rows == cache.rollouts else f" (of {cache.rollouts} rollouts, which take turns)"
        yield (
            f"{phase} {_most(memory, phase)} with a KV cache of {gigabytes(cache.num_bytes)}: "
            f"{cache.rows} rows{turns} of {cache.length:,} tokens"
        )
    if SAVES in memory.phases(next(iter(memory.peaks.values()))):
        yield f"{SAVES} {_most(memory, SAVES)}"
    measured = "measured" if device.kind == "cpu" else "assumed: CUDA context, NCCL, fragments"
    yield f"An upper bound: every answer has the most tokens. process: {measured}."


def _most(memory: MemoryPlan, phase: str) -> str:
    return gigabytes(max(memory.phases(footprint)[phase] for footprint in memory.peaks.values()))


def _time(estimate: Estimate, kind: str) -> Iterator[str]:
    """Yield the time of a step in one line, and where it comes from in another."""
    parts = {"rollouts": estimate.rollout_seconds, "weight sync": estimate.sync_seconds}
    for name in ("teacher", "student", "update"):
        parts[name] = sum(cost.seconds for cost in estimate.costs if cost.name.startswith(name))
    shown = [f"{name} {duration(seconds)}" for name, seconds in parts.items() if seconds >= 0.05]
    source = "rates of this CPU, measured just now" if kind == "cpu" else "the data sheet; not measured"
    yield ""
    yield f"time       a step of about {duration(estimate.seconds)} at most: {', '.join(shown) or 'less than 0.1 s'}"
    yield f"           ({estimate.world} process{'es' if estimate.world > 1 else ''}; {source})"


def _ranks(ranks: range) -> str:
    return f"ranks {ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
