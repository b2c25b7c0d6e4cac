"""What a forward pass knows of the micro-batch that runs through it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_oprd.models.kv_cache import CachedStep
from megatron_oprd.models.tap_params import TappedSeqParams


@dataclass(frozen=True)
class ContextPart:
    """This rank's place among the context-parallel ranks, each of which holds two chunks of every sequence
    (`data/context_parallel_slices.py`)."""

    group: dist.ProcessGroup
    rank: int
    size: int
    order: torch.Tensor  # [tokens of all ranks] int64: where the rows of the sequences lie among the gathered ones


@dataclass(kw_only=True)
class MicroBatch(TappedSeqParams):
    """Packing of one micro-batch, its tap, and what the layers of this package need beside them."""

    position_ids: torch.Tensor  # [tokens] int64
    lengths: torch.Tensor  # [tokens] int64: tokens of the sequence that each belongs to; LongRoPE goes by it
    bounds: tuple[int, ...]  # cumulative lengths of the packed sequences, whole under context parallelism too
    context: ContextPart | None = None  # None: this rank holds whole sequences
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin [tokens, 1, rotary_dim], by the model
    fused_packing: PackedSeqParams | None = None  # the packing for Transformer Engine, by its first layer
    logit_rows: torch.Tensor | None = None  # [rows] int64: tokens for which the last stage applies the LM head
    cache: CachedStep | None = None  # generation: stored keys and values; `bounds` then starts after the single tokens

    def for_layer(self) -> MicroBatch:
        """Return the micro-batch itself: the attention of this package needs all of it."""
        return self


def of(arguments: dict) -> MicroBatch:
    """The micro-batch among the keyword arguments of a Megatron forward; raises TypeError for a call without one."""
    micro_batch = arguments.get("packed_seq_params")
    if not isinstance(micro_batch, MicroBatch):
        raise TypeError("the model runs on a MicroBatch, handed over as packed_seq_params")
    return micro_batch
