"""LongRoPE during generation: recompute the cache of a row when its length passes the range of the short factors."""

from __future__ import annotations

import torch

from megatron_oprd.models.kv_cache import CachedStep, KeyValueCache
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import pass_through
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.slots import Slots
from megatron_oprd.types import LongRope, ModelSpec


def refill_crossing_rows(
    stage: Stage, spec: ModelSpec, topology: Topology, slots: Slots, cache: KeyValueCache, tokens_per_pass: int
) -> None:
    """Recompute the cached keys of rows that are about to pass LongRoPE's `original_positions`.

    A sequence of at most `original_positions` tokens uses the short factors for all its keys, a longer one the long
    factors. After the recomputation, sampling equals a forward pass over the complete sequence. Does nothing for a
    model without LongRoPE.

    Args:
        tokens_per_pass: most tokens of one forward pass; a longer row gets a pass of its own.

    Communicates over: the tensor- and the pipeline-parallel group, if there are such rows.
    """
    if not isinstance(spec.rope_scaling, LongRope):
        return
    short = spec.rope_scaling.original_positions
    if slots.longest <= short:
        return
    crossing = (slots.positions[: slots.count] == short).nonzero()[:, 0].tolist()
    at_once = max(1, tokens_per_pass // short)
    for first in range(0, len(crossing), at_once):
        rows = crossing[first : first + at_once]
        tokens = torch.cat([slots.sequence(row)[:short] for row in rows])
        positions = torch.arange(short, device=tokens.device).repeat(len(rows))
        targets = tuple(torch.tensor([row], device=tokens.device) for row in rows)
        empty = tokens[:0]
        step = CachedStep(cache, 0, empty, empty, slots.longest, None, targets)
        batch = MicroBatch(
            position_ids=positions,
            lengths=torch.full_like(positions, short + 1),
            bounds=tuple(range(0, len(tokens) + 1, short)),
            cache=step,
        )
        pass_through(stage, topology, tokens, batch)
