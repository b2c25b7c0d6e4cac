"""Keys and values of earlier tokens, so that generation runs the model once for each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.types import ModelSpec

CHUNK = 128  # the capacity is a multiple of this number of positions


def kv_cache_bytes(spec: ModelSpec, rows: int, length: int, layers: int, tensor_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of a rank's keys and values in generation.

    Args:
        rows: rollouts that are generated at once.
        length: tokens of the longest row, prompt and response; at most `max_position_embeddings` of them are stored.
        layers: transformer layers of the rank.
        tensor_size: ranks of the tensor-parallel group, which share the key-value heads.
    """
    token_bytes = 2 * layers * (spec.num_query_groups // tensor_size) * spec.head_dim * dtype.itemsize
    return rows * min(length, spec.max_position_embeddings) * token_bytes


class KeyValueCache:
    """Keys and values [slots, groups, capacity, d] of each layer of a stage, filled from position 0 in each slot.

    Memory: 2 * layers * slots * groups * capacity * d * itemsize bytes, for the layers of this stage and the key-value
    heads of this tensor-parallel rank. The capacity grows with the longest slot, CHUNK positions at a time.
    No communication.
    """

    def __init__(
        self, layers: Sequence[int], slots: int, groups: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = 0
        # Zeros instead of empty memory: a masked position has weight 0, and 0 times NaN is NaN.
        self.keys = {
            layer: torch.zeros(slots, groups, self.capacity, width, dtype=dtype, device=device) for layer in layers
        }
        self.values = {layer: torch.zeros_like(keys) for layer, keys in self.keys.items()}

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all keys and values."""
        tensors = (*self.keys.values(), *self.values.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions in each slot. The capacity grows by a quarter at least, to copy rarely."""
        if length <= self.capacity:
            return
        needed = max(length, self.capacity + self.capacity // 4)
        capacity = -(-needed // CHUNK) * CHUNK
        for by_layer in (self.keys, self.values):
            for layer, old in by_layer.items():
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.capacity] = old
                by_layer[layer] = new
        self.capacity = capacity

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of slots `sources` to slots `targets`, both [n] int64 and disjoint."""
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[targets, :, :length] = tensor[sources, :, :length]

    def fill(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write a prompt's key and value [groups, tokens, d] into `slots` [n], one for each sample of the prompt."""
        self.keys[layer][slots, :, : key.shape[1]] = key
        self.values[layer][slots, :, : value.shape[1]] = value

    def append(
        self, layer: int, step: CachedStep, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token for each row, key and value [rows, groups, d].

        Returns: two views [rows, groups, longest, d], the keys and values to which the rows attend.
        """
        keys, values = self.keys[layer], self.values[layer]
        if step.mask is None:  # all rows are at the same position: a copy is several times faster than an indexed write
            keys[: step.rows, :, step.longest - 1] = key
            values[: step.rows, :, step.longest - 1] = value
        else:
            keys[step.slots, :, step.positions] = key
            values[step.slots, :, step.positions] = value
        return keys[: step.rows, :, : step.longest], values[: step.rows, :, : step.longest]


@dataclass(frozen=True)
class CachedStep:
    """The arguments of a forward pass with a cache.

    The first `rows` tokens continue the slots 0 to rows - 1, one token each. Whole prompts follow, packed according to
    `MicroBatch.bounds`, whose first bound is `rows`.
    """

    cache: KeyValueCache
    rows: int
    slots: torch.Tensor  # [rows] int64: 0 to rows - 1
    positions: torch.Tensor  # [rows] int64: position of each token in its slot
    longest: int  # positions in the longest row, with the new token
    mask: (
        torch.Tensor | None
    )  # [rows, 1, 1, longest], 0 or -inf in the model's dtype; None: all rows have the same length
    prompt_slots: tuple[torch.Tensor, ...]  # for each packed prompt, its slots [samples] int64
