"""Keys and values of earlier tokens, so that generation runs the model once for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import ModelSpec


def kv_cache_bytes(spec: ModelSpec, rows: int, length: int, layers: int, tensor_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of a rank's keys and values in generation: exactly those that `KeyValueCache` allocates.

    Args:
        rows: rollouts that are generated at once.
        length: tokens of the longest row, prompt and response; at most `max_position_embeddings` of them are stored.
        layers: transformer layers of the rank.
        tensor_size: ranks of the tensor-parallel group, which share the key-value heads.
    """
    token_bytes = 2 * layers * (spec.num_query_groups // tensor_size) * spec.head_dim * dtype.itemsize
    return rows * min(length, spec.max_position_embeddings) * token_bytes


class KeyValueCache:
    """Keys and values of a stage's layers: `data` [layers, slots, groups, 2, capacity, d], keys at 0, values at 1.

    The memory is allocated once, `kv_cache_bytes` for `slots` rows of `length` tokens, and neither grows nor moves.
    `token_major` puts all heads of a token side by side in memory, which flash attention needs. Otherwise all tokens of
    a head are side by side, which is fastest on a CPU. The order of the dimensions is the same. `windows` has the
    sliding window of each layer, 0 for none; every token is stored nevertheless. No communication.
    """

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology,
        layers: int,
        slots: int,
        length: int,
        dtype: torch.dtype,
        *,
        token_major: bool = False,
        windows: Sequence[int] = (),
    ) -> None:
        self.slots = slots
        self.windows = tuple(windows) or (0,) * layers
        self.capacity = min(length, spec.max_position_embeddings)
        self.token_major = token_major
        groups, width = spec.num_query_groups // topology.tensor_size, spec.head_dim
        # Zeros instead of empty memory: a masked position has weight 0, and 0 times NaN is NaN.
        if token_major:
            stored = torch.zeros(layers, slots, self.capacity, groups, 2, width, dtype=dtype, device=topology.device)
            self.data = stored.permute(0, 1, 3, 4, 2, 5)
        else:
            self.data = torch.zeros(layers, slots, groups, 2, self.capacity, width, dtype=dtype, device=topology.device)
        self.by_token = self.data.permute(0, 1, 4, 2, 3, 5).unbind(0)  # [slots, capacity, groups, 2, d] of each layer

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all keys and values."""
        return self.data.numel() * self.data.element_size()

    def write(self, layer: int, slots: torch.Tensor, positions: torch.Tensor, key_value: torch.Tensor) -> None:
        """Store `key_value` [n, groups, 2, d] at `positions` [n] of `slots` [n]."""
        self.by_token[layer].index_put_((slots, positions), key_value)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of slots `sources` to slots `targets`, both [n] int64 and disjoint."""
        stored = self.data[..., :length, :]
        stored[:, targets] = stored[:, sources]
