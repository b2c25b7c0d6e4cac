"""What a forward pass knows of the micro-batch that runs through it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_oprd.models.kv_cache import CachedStep
from megatron_oprd.types import StateKey


class Tap(Protocol):
    """Receives the hidden states of a layer (1-based, or FINAL_STATES), [tokens, 1, hidden], this rank's part of the
    tokens under context and sequence parallelism, and returns what flows on in its place."""

    def __call__(self, layer: StateKey, hidden_states: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class ContextPart:
    """This rank's place among the context-parallel ranks, each of which holds two chunks of every sequence
    (`data/context_parallel_slices.py`)."""

    group: dist.ProcessGroup
    rank: int
    size: int
    order: torch.Tensor  # [tokens of all ranks] int64: where the rows of the sequences lie among the gathered ones


@dataclass(kw_only=True)
class MicroBatch(PackedSeqParams):
    """Packing of one micro-batch and who listens to its layers.

    It takes the place of `packed_seq_params`, which mcore hands down to every layer as an argument and keeps for
    recomputation: a layer that runs again during backward, after another micro-batch's forward, still sees its own.
    """

    position_ids: torch.Tensor  # [tokens] int64
    lengths: torch.Tensor  # [tokens] int64: tokens of the sequence that each belongs to; LongRoPE goes by it
    bounds: tuple[int, ...]  # cumulative lengths of the packed sequences, whole under context parallelism too
    context: ContextPart | None = None  # None: this rank holds whole sequences
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin [tokens, 1, rotary_dim], by the model
    fused_packing: PackedSeqParams | None = None  # the packing for Transformer Engine, by its first layer
    tap: Tap | None = None
    last_layer: int | None = None  # blocks above it (1-based) are skipped; None: all run
    normed_layer: int | None = None  # the layer that is tapped after the final norm (L); None: before it
    logit_rows: torch.Tensor | None = None  # [rows] int64: tokens for which the last stage applies the LM head
    cache: CachedStep | None = None  # generation: stored keys and values; `bounds` then starts after the single tokens


def of(arguments: dict) -> MicroBatch:
    """The micro-batch among the keyword arguments of a Megatron forward; raises TypeError for a call without one."""
    micro_batch = arguments.get("packed_seq_params")
    if not isinstance(micro_batch, MicroBatch):
        raise TypeError("the model runs on a MicroBatch, handed over as packed_seq_params")
    return micro_batch
