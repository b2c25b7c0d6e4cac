"""Keys and values of earlier tokens, so that generation runs the model once for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.topology import Topology


def rollout_cache_bytes(
    spec: ModelSpec, rows: int, length: int, layers: Sequence[int], tensor_size: int, dtype: torch.dtype
) -> int:
    """Return the bytes that a rank stores for its rows in generation: exactly those that the caches allocate.

    These are the keys and values of layers with attention (`KeyValueCache`), which grow with the length, and the
    states of layers with Gated DeltaNet (`RecurrentCache`), which do not.

    Args:
        rows: rollouts that are generated at once.
        length: tokens of the longest row, prompt and response; at most `max_position_embeddings` of them are stored.
        layers: 0-based layers of the model on the rank.
        tensor_size: ranks of the tensor-parallel group, which share the heads.
        dtype: dtype of the model.
    """
    linear = sum(layer in spec.linear_layers for layer in layers)
    token_bytes = 2 * (len(layers) - linear) * (spec.num_query_groups // tensor_size) * spec.head_dim * dtype.itemsize
    row_bytes = min(length, spec.max_position_embeddings) * token_bytes
    if spec.delta_net is not None:
        sizes, key_heads = spec.delta_net, spec.delta_net.num_key_heads // tensor_size
        states = sizes.state_size // tensor_size * state_dtype(dtype).itemsize
        tails = key_heads * sizes.convolved * (sizes.kernel - 1) * dtype.itemsize
        row_bytes += linear * (states + tails)
    return rows * row_bytes


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the states of Gated DeltaNet in a model of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class KeyValueCache:
    """Keys and values of some layers: `data` [layers, slots, groups, 2, capacity, d], keys at 0, values at 1.

    The memory is allocated once, for `slots` rows of `length` tokens, and neither grows nor moves. `token_major` puts
    all heads of a token side by side in memory, which flash attention needs. Otherwise all tokens of a head are side
    by side, which is fastest on a CPU. The order of the dimensions is the same. No communication.

    Args:
        windows: the sliding window of each layer, 0 for none, by the layer's number in the model. Layers with Gated
            DeltaNet are missing. Every token is stored, whatever the window.
    """

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology,
        windows: Mapping[int, int],
        slots: int,
        length: int,
        dtype: torch.dtype,
        *,
        token_major: bool = False,
    ) -> None:
        self.slots = slots
        self.windows = dict(windows)
        self.capacity = min(length, spec.max_position_embeddings)
        self.token_major = token_major
        layers, groups, width = len(windows), spec.num_query_groups // topology.tensor_size, spec.head_dim
        # Zeros instead of empty memory: a masked position has weight 0, and 0 times NaN is NaN.
        if token_major:
            stored = torch.zeros(layers, slots, self.capacity, groups, 2, width, dtype=dtype, device=topology.device)
            self.data = stored.permute(0, 1, 3, 4, 2, 5)
        else:
            self.data = torch.zeros(layers, slots, groups, 2, self.capacity, width, dtype=dtype, device=topology.device)
        self.by_token = self.by_layer(self.data.permute(0, 1, 4, 2, 3, 5))  # [slots, capacity, groups, 2, d]

    @property
    def num_bytes(self) -> int:
        """Return the bytes of all keys and values."""
        return self.data.numel() * self.data.element_size()

    def by_layer(self, stored: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the parts of stored [layers, ...] by the number of the layer in the model."""
        return dict(zip(self.windows, stored.unbind(0), strict=True))

    def write(self, layer: int, slots: torch.Tensor, positions: torch.Tensor, key_value: torch.Tensor) -> None:
        """Store `key_value` [n, groups, 2, d] at `positions` [n] of `slots` [n]."""
        self.by_token[layer].index_put_((slots, positions), key_value)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of slots `sources` to slots `targets`, both [n] int64 and disjoint."""
        stored = self.data[..., :length, :]
        stored[:, targets] = stored[:, sources]
