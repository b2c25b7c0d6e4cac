"""LongRoPE during generation: recompute the cache of a row when its length passes the range of the short factors."""

from __future__ import annotations

import torch

from megatron_oprd.model_spec import LongRope, ModelSpec
from megatron_oprd.rollout.decoder import Decoder


def refill_crossing_rows(decoder: Decoder, spec: ModelSpec, tokens_per_pass: int) -> None:
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
    short, slots = spec.rope_scaling.original_positions, decoder.slots
    crossing = [slot for slot, request in slots.occupied() if slots.length(slot) == short + 1 <= request.longest]
    if crossing:
        decoder.finish()  # the last step's tokens are among those of the rows
    at_once = max(1, tokens_per_pass // short)
    for first in range(0, len(crossing), at_once):
        rows = crossing[first : first + at_once]
        tokens = torch.cat([slots.tokens_of(row, short) for row in rows])
        decoder.refill(rows, tokens, short + 1)
