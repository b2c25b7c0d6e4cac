"""Find the cheapest change of the configuration with which a run fits into the memory of its device.

Every change is planned again before it is recommended.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_oprd.config import with_settings
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.lengths import longest_prompt
from megatron_oprd.launch.setup import read_setup
from megatron_oprd.planning.memory_plan import SAVES, TRAINS, MemoryPlan, plan_memory
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.rollout.horizon import longest_response
from megatron_oprd.types import UserError

Settings = Mapping[str, Any]  # values by dotted key
SELECTIVE: Settings = {"recompute.granularity": "selective"}
FULL: Settings = {"recompute.granularity": "full", "recompute.method": "uniform", "recompute.num_layers": 1}


@dataclass(frozen=True)
class Change:
    """Settings with which a run fits, and its memory with them."""

    settings: Settings
    memory: MemoryPlan


def find_change(inputs: Inputs, memory: MemoryPlan) -> Change | None:
    """Return the cheapest change with which the run fits, or None. `memory`: its plan, which does not fit.

    First come settings that cost time alone. If they do not suffice, they are combined with one setting at a time that
    changes precision, the number of devices, or the length of the answers.
    """
    cheap = _less_activations(inputs)
    most = cheap[-1] if cheap else {}
    models_fit = memory.lasting * memory.device.sharers <= memory.device.memory
    if memory.phase == TRAINS and models_fit:
        changes = (_planned(inputs, memory, settings) for settings in cheap)
        found = next((change for change in changes if change is not None and change.memory.fits), None)
        if found is not None:
            return found
    for extra in _further(inputs, memory) if models_fit or memory.device.kind == "gpu" else ():
        change = _planned(inputs, memory, {**most, **extra})
        if change is not None and change.memory.fits:
            alone = _planned(inputs, memory, extra)
            return alone if alone is not None and alone.memory.fits else change
    return None


def _less_activations(inputs: Inputs) -> list[Settings]:
    """Return the settings that need less memory for activations, the cheapest first and the strongest last."""
    config = inputs.config
    recompute: list[Settings] = [{"none": SELECTIVE, "selective": FULL}.get(config.recompute.granularity, {})]
    if config.recompute.granularity == "none":
        recompute.append(FULL)
    longest = inputs.lengths.sequence
    if inputs.prompts is not None:
        longest = max(longest, longest_prompt(inputs.prompts.prompts) + longest_response(config))
    smaller: Settings = {"batch.max_tokens_per_micro_batch": longest}
    if longest >= config.batch.max_tokens_per_micro_batch or inputs.aligner is not None:
        smaller = {}
    first, last = recompute[0], recompute[-1]
    choices = [first, smaller, last, {**last, **smaller}]
    return [choice for number, choice in enumerate(choices) if choice and choice not in choices[:number]]


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
            yield {"rollout.max_new_tokens": tokens, "batch.max_tokens_per_micro_batch": smaller}
        return
    if config.precision.teacher_fp8 == "off" and config.precision.dtype == "bf16":
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
        setup = read_setup(config, config.named_teachers, dry_run=True)
    except UserError:
        return None
    changed = dataclasses.replace(inputs, config=config, setup=setup)
    return Change(settings, plan_memory(PlannedRun.of(changed), memory.device))
