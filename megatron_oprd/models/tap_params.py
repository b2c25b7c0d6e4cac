"""The argument that carries a tap through Megatron-Core to the transformer layers of one micro-batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_oprd.types import StateKey


class Tap(Protocol):
    """A function that a model calls with hidden states while one micro-batch runs through it."""

    def __call__(self, key: StateKey, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the hidden states that the next layer gets: the same values, perhaps with a loss attached.

        Args:
            key: the layer that computed the states, from 1 to L, or FINAL_STATES.
            hidden_states: [sequence, batch, hidden]; under sequence and context parallelism the rows of this rank.
        """
        ...


@dataclass(kw_only=True)
class TappedSeqParams(PackedSeqParams):
    """The `packed_seq_params` of a forward pass, together with the tap of its micro-batch.

    Megatron-Core passes this argument to every layer and stores it for recomputation. A layer that runs again during
    backward therefore finds the tap of its own micro-batch, also when other micro-batches ran in between.
    """

    tap: Tap | None = None
    last_layer: int | None = None  # layers above this number do not run; None: all layers run
    normed_layer: int | None = None  # the layer (L) that the model, not the layer, taps: after the final norm
    layer_params: PackedSeqParams | None = None  # the packed_seq_params that the layer itself receives

    def for_layer(self) -> PackedSeqParams | None:
        """Return the `packed_seq_params` for Megatron-Core's own layer."""
        return self.layer_params


def with_tap(
    tap: Tap, packed_seq_params: PackedSeqParams | None = None, *, sequence_length: int | None = None
) -> TappedSeqParams:
    """Return the `packed_seq_params` that makes a model with tapped layers call `tap`.

    Args:
        tap: a StageLoss, a CaptureTap or any other Tap.
        packed_seq_params: the packing of the micro-batch; None for a plain [batch, sequence] micro-batch.
        sequence_length: tokens of each sequence of a plain micro-batch, before tensor and context parallelism divide
            them. Megatron-Core computes the rotary embedding for this length.

    Raises:
        ValueError: not exactly one of `packed_seq_params` and `sequence_length` was given.
    """
    if (packed_seq_params is None) == (sequence_length is None):
        raise ValueError("with_tap: give either packed_seq_params (packed sequences) or sequence_length (plain batch)")
    if packed_seq_params is None:
        return TappedSeqParams(qkv_format="sbhd", max_seqlen_q=sequence_length, max_seqlen_kv=sequence_length, tap=tap)
    names = [field.name for field in dataclasses.fields(PackedSeqParams)]
    values = {name: getattr(packed_seq_params, name) for name in names}
    return TappedSeqParams(**values, tap=tap, layer_params=packed_seq_params)
