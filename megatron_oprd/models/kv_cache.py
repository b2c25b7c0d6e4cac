"""Keys and values of the tokens that were read already, so that generation reads each token once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK = 128  # positions by which the capacity grows at least


class KeyValueCache:
    """For each layer of a stage, keys and values [slots, groups, capacity, d], filled from position 0 in each slot.

    Holds 2 * layers * slots * groups * capacity * d * itemsize bytes, with the layers of this stage and the key-value
    heads of this tensor-parallel rank. Capacity follows the longest row, a chunk at a time. No communication.
    """

    def __init__(
        self, layers: Sequence[int], slots: int, groups: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = 0
        # Zeros, not empty memory: a masked position weighs 0, but 0 times a stray NaN would be NaN.
        self.keys = {
            layer: torch.zeros(slots, groups, self.capacity, width, dtype=dtype, device=device) for layer in layers
        }
        self.values = {layer: torch.zeros_like(keys) for layer, keys in self.keys.items()}

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        return sum(x.numel() * x.element_size() for held in (self.keys, self.values) for x in held.values())

    def reserve(self, length: int) -> None:
        """Make room for `length` positions a slot; a quarter more than before at least, so that copies stay few."""
        if length <= self.capacity:
            return
        wanted = max(length, self.capacity + self.capacity // 4)
        capacity = -(-wanted // CHUNK) * CHUNK
        for held in (self.keys, self.values):
            for layer, old in held.items():
                new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
                new[:, :, : self.capacity] = old
                held[layer] = new
        self.capacity = capacity

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of slots `sources` to slots `targets`, both [n] int64 and disjoint."""
        for held in (self.keys, self.values):
            for tensor in held.values():
                tensor[targets, :, :length] = tensor[sources, :, :length]

    def fill(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one prompt, key and value [groups, tokens, d], into each of `slots` [n] (the samples that share it)."""
        self.keys[layer][slots, :, : key.shape[1]] = key
        self.values[layer][slots, :, : value.shape[1]] = value

    def append(
        self, layer: int, step: CachedStep, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a row, key and value [rows, groups, d], and return what the rows attend to: two views
        [rows, groups, longest, d]."""
        keys, values = self.keys[layer], self.values[layer]
        if step.mask is None:  # all rows at one position: a copy is several times cheaper than an indexed write
            keys[: step.rows, :, step.longest - 1] = key
            values[: step.rows, :, step.longest - 1] = value
        else:
            keys[step.slots, :, step.positions] = key
            values[step.slots, :, step.positions] = value
        return keys[: step.rows, :, : step.longest], values[: step.rows, :, : step.longest]


@dataclass(frozen=True)
class CachedStep:
    """What one forward pass reads and writes: its first `rows` tokens continue slots 0 to rows - 1, one token each;
    whole prompts follow, packed as `MicroBatch.bounds` says (its first bound is `rows`)."""

    cache: KeyValueCache
    rows: int
    slots: torch.Tensor  # [rows] int64: 0 to rows - 1
    positions: torch.Tensor  # [rows] int64: where each token goes in its slot
    longest: int  # positions to attend to, the new one included, in the longest row
    mask: torch.Tensor | None  # [rows, 1, 1, longest], 0 or -inf in the model's dtype; None: all rows equally long
    prompt_slots: tuple[torch.Tensor, ...]  # for each packed prompt, the slots that it fills, [samples] int64
