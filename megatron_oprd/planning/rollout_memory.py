"""Memory of the KV cache, and of the states of Gated DeltaNet, with which the student generates its rollouts."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.kv_cache import rollout_cache_bytes
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.rollout.batch_rows import MAX_ROWS, rows_that_fit

DEVICE_BYTES = 80 * 10**9  # memory of the planned device


@dataclass(frozen=True)
class CachePlan:
    """The KV cache of a replica in a step whose prompts are the longest and whose responses reach their limit."""

    rows: int  # rollouts that a replica generates at once
    rollouts: int  # rollouts of a replica in a step
    length: int  # tokens of a row, prompt and response
    num_bytes: int  # on the rank with the most


def plan_cache(run: PlannedRun, used_bytes: int, device_bytes: int = DEVICE_BYTES) -> CachePlan | None:
    """Return the KV cache of a run, or None if the student generates nothing (stored responses, servers).

    Args:
        run: The run.
        used_bytes: Weights of student and teachers on the fullest rank: the engine takes a third of the other memory.
        device_bytes: Memory of a device.
    """
    config, spec, parallel = run.config, run.setup.student, run.config.parallel
    if config.rollout.engine != "megatron":
        return None
    stages = run.setup.student_stages
    bounds = list(itertools.pairwise(itertools.accumulate(stages, initial=0)))  # first and last layer of a stage
    layers = [
        [layer for bound in bounds[rank :: parallel.pipeline] for layer in range(*bound)]
        for rank in range(parallel.pipeline)
    ]
    length = min(run.lengths.generated, spec.max_position_embeddings)

    def cache_bytes(rows: int, length: int) -> int:
        dtype = DTYPES[config.precision.dtype]
        return max(rollout_cache_bytes(spec, rows, length, rank, parallel.tensor, dtype) for rank in layers)

    rollouts = rollouts_of_replica(run)
    longest_row = min(config.data.max_prompt_tokens + run.lengths.response, spec.max_position_embeddings)
    fitting = rows_that_fit(cache_bytes(1, longest_row), max(device_bytes - used_bytes, 0))
    rows = min(rollouts, MAX_ROWS, fitting)
    return CachePlan(rows, rollouts, length, cache_bytes(rows, length))


def rollouts_of_replica(run: PlannedRun) -> int:
    """Return the most rollouts that a replica of the student generates in a step. All samples of a prompt are on one.

    Context-parallel ranks generate rollouts of their own, like data-parallel ranks.
    """
    parallel, rollout = run.config.parallel, run.config.rollout
    replicas = run.setup.world_size // (parallel.tensor * parallel.pipeline)
    return math.ceil(rollout.prompts_per_step / replicas) * rollout.samples_per_prompt
