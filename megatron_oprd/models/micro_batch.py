"""The arguments of a forward pass that belong to one micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_oprd.models.delta_rule import ChunkPlan
from megatron_oprd.models.flash import Sequences
from megatron_oprd.models.tap_params import TappedSeqParams


@dataclass(frozen=True)
class ContextPart:
    """The place of this rank in its context-parallel group. Each rank has two chunks of every sequence
    (`data/context_parallel_slices.py`)."""

    group: dist.ProcessGroup
    rank: int
    size: int
    order: torch.Tensor  # [tokens of all ranks] int64: the place of each row of the sequences among the gathered rows


@dataclass(kw_only=True)
class MicroBatch(TappedSeqParams):
    """Packing of one micro-batch, its tap, and what the layers of this package need beside them."""

    position_ids: torch.Tensor  # [tokens] int64
    lengths: torch.Tensor  # [tokens] int64: length of each token's sequence; LongRoPE needs it
    bounds: tuple[int, ...]  # cumulative lengths of the packed sequences; whole sequences under context parallelism too
    context: ContextPart | None = None  # None: this rank has whole sequences
    rotary: tuple[torch.Tensor, torch.Tensor] | None = (
        None  # cos and `signed` sin [tokens, 1, rotary_dim]; set by the model
    )
    fused_packing: PackedSeqParams | None = None  # for Transformer Engine; set by the first layer
    taps_input: bool = False  # True: the tap also gets the input of a chunk that is not the first
    chunks: ChunkPlan | None = None  # for Gated DeltaNet; set by the first such layer
    device_bounds: tuple[torch.Tensor, int] | None = None  # set by the first layer that calls `bounds_on`
    attention_calls: list[Sequences] | None = None  # for `models/flash.py`; set by the first layer that has its kernels
    logit_rows: torch.Tensor | None = None  # [rows] int64: tokens for which the last stage applies the LM head

    def bounds_on(self, device: torch.device) -> tuple[torch.Tensor, int]:
        """Return `bounds` as an int32 tensor on a device, and the length of the longest sequence. Copies them once."""
        if self.device_bounds is None:
            bounds = torch.tensor(self.bounds, dtype=torch.int32)
            self.device_bounds = bounds.to(device), int(bounds.diff().max())
        return self.device_bounds

    def for_layer(self) -> MicroBatch:
        """Return the micro-batch itself: the attention of this package needs all of it."""
        return self


def of(arguments: dict) -> MicroBatch:
    """Return the micro-batch among the keyword arguments of a Megatron forward. Raises TypeError without one."""
    micro_batch = arguments.get("packed_seq_params")
    if not isinstance(micro_batch, MicroBatch):
        raise TypeError("the model runs on a MicroBatch, handed over as packed_seq_params")
    return micro_batch
