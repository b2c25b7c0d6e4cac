"""LongRoPE while generating: a row that outgrows the short factors is read again with the long ones."""

from __future__ import annotations

import torch

from megatron_oprd.models.kv_cache import CachedStep, KeyValueCache
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import pass_through
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.slots import Slots
from megatron_oprd.types import LongRope, ModelSpec


def read_again(
    stage: Stage, spec: ModelSpec, topology: Topology, slots: Slots, cache: KeyValueCache, tokens_per_pass: int
) -> None:
    """Fill the cache anew for the rows whose last token, not yet in it, is the first beyond LongRoPE's
    `original_positions`; nothing for a model without LongRoPE.

    Their keys were made with the short factors, and all of a longer sequence have the long ones: what is sampled from
    here on is what a forward pass over the whole sequence gives. A pass reads `tokens_per_pass` tokens, or one row.
    Communicates over the tensor- and the pipeline-parallel group when there are such rows.
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
        nothing = tokens[:0]
        step = CachedStep(cache, 0, nothing, nothing, slots.longest, None, targets)
        batch = MicroBatch(
            position_ids=positions,
            lengths=torch.full_like(positions, short + 1),
            bounds=tuple(range(0, len(tokens) + 1, short)),
            cache=step,
        )
        pass_through(stage, topology, tokens, batch)
