"""The number of rollouts that are generated at once."""

from __future__ import annotations

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.kv_cache import rollout_cache_bytes
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.collectives import min_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import platform

MAX_ROWS = 256  # a larger batch does not make a decode step cheaper


def rows_at_a_time(
    spec: ModelSpec, topology: Topology, stage: Stage, longest_row: int, max_rows: int = MAX_ROWS
) -> int:
    """Return how many rollouts of up to `longest_row` tokens are generated at once.

    Their keys, values and states fill at most a third of the free memory. All ranks of a replica return the same
    number.

    Communicates over: the tensor- and the pipeline-parallel group.
    """
    size, dtype = topology.tensor_size, stage.config.params_dtype
    row_bytes = rollout_cache_bytes(spec, 1, longest_row, stage.layers, size, dtype)
    rows: float = min(max_rows, rows_that_fit(row_bytes, platform.free_memory_bytes(topology.device)))
    for group in (topology.groups.tp, topology.groups.pp):
        (rows,) = min_over([rows], group, topology.device)
    return int(rows)


def rows_that_fit(row_bytes: int, free_bytes: int) -> int:
    """Return how many rows of the caches fill a third of the free memory, at least one. No communication."""
    return max(1, free_bytes // 3 // max(row_bytes, 1))
