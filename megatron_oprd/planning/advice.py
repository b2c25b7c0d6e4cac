"""Find the cheapest change of the configuration with which a run fits into the memory of its device.

Every change is planned again before it is recommended.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_oprd.config import with_settings
from megatron_oprd.launch.inputs import RECOMPUTE, TOKENS, UNBOUNDED_TOKENS, Inputs, automatic_keys
from megatron_oprd.launch.lengths import longest_prompt
from megatron_oprd.launch.setup import read_setup, without_automatic
from megatron_oprd.planning.automatic import choose_automatic
from megatron_oprd.planning.memory_plan import SAVES, TRAINS, MemoryPlan, plan_memory
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.rollout.horizon import longest_response
from megatron_oprd.types import UserError

Settings = Mapping[str, Any]  # values by dotted key
AUTO: Settings = {"recompute": "auto"}
AUTO_TOKENS: Settings = {**AUTO, TOKENS: "auto"}
FULL: Settings = {"recompute.granularity": "full", "recompute.method": "uniform", "recompute.num_layers": 1}
ONLY_FULL: Settings = {"recompute": {"granularity": "full"}}  # also in place of `recompute.stages`


@dataclass(frozen=True)
class Change:
    """Settings with which a run fits, and its memory with them."""

    settings: Settings
    memory: MemoryPlan


@dataclass(frozen=True)
class _Attempt:
    """Settings that may be recommended, and settings that need no more memory and take one trace to plan."""

    settings: Settings
    least: Settings


def find_change(inputs: Inputs, memory: MemoryPlan, chosen: Collection[str] = ()) -> Change | None:
    """Return the cheapest change with which the run fits, or None.

    First come settings that cost time alone. If they do not suffice, they are combined with one setting at a time that
    changes precision, the number of devices, or the length of the answers.

    Args:
        inputs: The inputs of the run.
        memory: The plan of the run, which does not fit.
        chosen: The keys of `inputs` whose values were chosen for `auto`.
    """
    attempts = _less_activations(inputs, memory, chosen)
    models_fit = memory.lasting * memory.device.sharers <= memory.device.memory
    if memory.phase == TRAINS and models_fit:
        found = next(filter(None, (_fitting(inputs, memory, attempt) for attempt in attempts)), None)
        if found is not None:
            return found
    most = attempts[-1] if attempts else _Attempt({}, {})
    for extra in _further(inputs, memory) if models_fit or memory.device.kind == "gpu" else ():
        least = _planned(inputs, memory, {**most.least, **extra})
        if least is not None and least.memory.fits:
            alone = _planned(inputs, memory, extra)
            if alone is not None and alone.memory.fits:
                return alone
            return _planned(inputs, memory, {**most.settings, **extra}) or least
    return None


def _less_activations(inputs: Inputs, memory: MemoryPlan, chosen: Collection[str]) -> list[_Attempt]:
    """Return the settings that need less memory for activations, the cheapest first and the strongest last.

    Values are left to `auto`, which takes the cheapest ones that fit. It needs traces of an update.
    """
    longest = inputs.lengths.sequence
    if inputs.prompts is not None:
        longest = max(longest, longest_prompt(inputs.prompts.prompts) + longest_response(inputs.config))
    smaller: Settings = {TOKENS: longest}
    cheap: tuple[Settings, Settings] = (AUTO, AUTO_TOKENS)
    if memory.not_traced:
        cheap = (FULL, {**FULL, **smaller})
    attempts = [_Attempt(cheap[0], ONLY_FULL), _Attempt(cheap[1], {**ONLY_FULL, **smaller})]
    is_smallest = longest >= inputs.config.batch.max_tokens_per_micro_batch or inputs.aligner is not None
    if is_smallest or TOKENS in chosen:
        attempts.pop()
    if RECOMPUTE in chosen or inputs.config.recompute.granularity == "full":
        attempts = attempts[1:]
    return attempts


def _fitting(inputs: Inputs, memory: MemoryPlan, attempt: _Attempt) -> Change | None:
    """Return the change of an attempt if the run fits with it."""
    least = _planned(inputs, memory, attempt.least)
    if least is None or not least.memory.fits:
        return None
    change = _planned(inputs, memory, attempt.settings)
    return change if change is not None and change.memory.fits else None


def _further(inputs: Inputs, memory: MemoryPlan) -> Iterator[Settings]:
    """Yield settings that change more than the time of a step, the most harmless first."""
    config, parallel = inputs.config, inputs.config.parallel
    if memory.phase == SAVES:
        yield {"checkpoint.every": 0, "checkpoint.every_minutes": 0.0}
    if memory.device.kind == "cpu":
        for share in (2, 4, 8) if config.rollout.generates else ():
            tokens = config.rollout.max_new_tokens // share
            longest = inputs.lengths.sequence - longest_response(config) + tokens
            smaller = min(config.batch.max_tokens_per_micro_batch, longest)
            yield {"rollout.max_new_tokens": tokens, TOKENS: smaller}
        return
    if config.precision.first_teacher_fp8 == "off" and config.precision.dtype == "bf16":
        yield {"precision.teacher_fp8": "weights"}
    world = inputs.setup.world_size
    for tensor in (2, 4, 8):
        ranks = parallel.tensor * parallel.pipeline * parallel.context * tensor
        if "WORLD_SIZE" in os.environ and ranks > world:
            break
        processes: Settings = {"parallel.world_size": ranks} if ranks > world else {}
        yield {"parallel.tensor": parallel.tensor * tensor, "parallel.sequence": True, **processes}
    if config.optimizer.cpu_offload == 0:
        yield {"optimizer.cpu_offload": 1.0}


def _planned(inputs: Inputs, memory: MemoryPlan, settings: Settings) -> Change | None:
    """Return the memory of the run with `settings`, or None if they suit neither the models nor the device."""
    try:
        config = with_settings(inputs.config, settings)
        automatic = automatic_keys(config)
        config = without_automatic(config, UNBOUNDED_TOKENS)
        setup = read_setup(config, config.named_teachers, dry_run=True)
        changed = dataclasses.replace(inputs, config=config, setup=setup, automatic=automatic)
        if automatic:
            changed = choose_automatic(changed, memory.device).inputs
    except UserError:
        return None
    return Change(settings, plan_memory(PlannedRun.of(changed), memory.device))
