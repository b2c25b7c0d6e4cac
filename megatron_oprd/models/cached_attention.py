"""Attention in generation: decoded tokens over the KV cache, and prompts, whose keys and values enter the cache.

Both classes take the projections of one layer after the rotary embedding, [tokens, groups, heads / groups + 2, d]: the
queries of a group, then its key, then its value. They return [tokens, heads * d].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from megatron_oprd.models.attention import causal_attention
from megatron_oprd.models.flash import flash_attention
from megatron_oprd.models.kv_cache import KeyValueCache


class DecodeAttention:
    """Attention of one new token for each row over the tokens of its slot.

    No shape and no kernel depends on the values of `positions`: a CUDA graph can capture it. No communication.

    Args:
        rows: the rows, whose numbers are those of their slots.
        positions: [rows] int64, the position of each row's token.
        longest: number of positions to which the rows attend at most. Flash attention uses each row's own length.
    """

    def __init__(self, cache: KeyValueCache, rows: range, positions: torch.Tensor, longest: int) -> None:
        device = positions.device
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(rows.start, rows.stop, device=device)
        if cache.token_major:
            self.lengths = (positions + 1).int()
            self.row_bounds = torch.arange(len(rows) + 1, dtype=torch.int32, device=device)
            self.slot_bounds = (self.row_bounds + rows.start) * cache.capacity
            # [layers, slots * capacity, groups, d]: views, since the slots are one after the other in memory.
            by_token = cache.data.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
            self.keys, self.values = (cache.by_layer(stored) for stored in by_token.unbind(0))
        else:
            beyond = torch.arange(longest, device=device) > positions[:, None]
            self.masks = {}  # by sliding window; 0: none
            for window in set(cache.windows.values()):
                hidden = beyond
                if window:
                    hidden = beyond | (torch.arange(longest, device=device) <= (positions - window)[:, None])
                mask = torch.zeros(beyond.shape, dtype=cache.data.dtype, device=device)
                self.masks[window] = mask.masked_fill_(hidden, -torch.inf)[:, None, None]
            by_head = cache.data.narrow(1, rows.start, len(rows)).narrow(4, 0, longest)
            self.keys, self.values = (cache.by_layer(stored) for stored in by_head.unbind(3))

    def __call__(self, layer: int, projections: torch.Tensor, scale: float) -> torch.Tensor:
        """Store keys and values of the tokens of a layer, and compute their attention."""
        self.cache.write(layer, self.rows, self.positions, projections[:, :, -2:])
        rows, groups, per_group, width = projections.shape
        queries, keys, values = projections[:, :, :-2], self.keys[layer], self.values[layer]
        if self.cache.token_major:
            output = flash_attention(
                (queries.reshape(rows, groups * (per_group - 2), width), keys, values),
                (self.row_bounds, self.slot_bounds),
                (1, self.cache.capacity),
                scale,
                lengths=self.lengths,
            )
        else:
            # The heads of a group are the queries of one head. A single token needs no causal mask, and keys and values
            # are not repeated for every head (2 to 3 times faster on a CPU than enable_gqa).
            output = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=self.masks[self.cache.windows[layer]], scale=scale
            )
        return output.reshape(rows, -1)


class PromptAttention:
    """Causal attention inside each of some packed sequences, which start at position 0.

    Their keys and values are stored in the cache, for each sequence in all slots of its samples. No communication.

    Args:
        bounds: [sequences + 1] cumulative lengths of the sequences.
        slots: the slots of each sequence; none stores nothing.
    """

    def __init__(self, cache: KeyValueCache, bounds: Sequence[int], slots: Sequence[Sequence[int]]) -> None:
        self.cache, self.bounds = cache, bounds
        self.lengths = [end - start for start, end in itertools.pairwise(bounds)]
        device = cache.data.device
        copies = [
            (torch.arange(start, end), slot)
            for (start, end), samples in zip(itertools.pairwise(bounds), slots, strict=True)
            for slot in samples
        ]
        empty = torch.empty(0, dtype=torch.int64)
        self.tokens = torch.cat([empty, *(tokens for tokens, _ in copies)]).to(device)
        self.slots = torch.cat([empty, *(torch.full_like(tokens, slot) for tokens, slot in copies)]).to(device)
        self.positions = torch.cat([empty, *(torch.arange(len(tokens)) for tokens, _ in copies)]).to(device)
        self.device_bounds = torch.tensor(bounds, dtype=torch.int32, device=device)

    def __call__(self, layer: int, projections: torch.Tensor, scale: float) -> torch.Tensor:
        """Store keys and values of a layer for each sample, and compute attention inside the sequences."""
        self.cache.write(layer, self.slots, self.positions, projections[self.tokens, :, -2:])
        tokens, groups, per_group, width = projections.shape
        queries = projections[:, :, :-2].reshape(tokens, groups * (per_group - 2), width)
        keys, values = projections[:, :, -2:].unbind(2)
        if self.cache.token_major:
            bounds, longest = (self.device_bounds,) * 2, (max(self.lengths),) * 2
            output = flash_attention((queries, keys, values), bounds, longest, scale)
            return output.reshape(tokens, -1)
        pieces = [
            causal_attention(
                *(x[start:end].transpose(0, 1).unsqueeze(0) for x in (queries, keys, values)),
                scale=scale,
                window=self.cache.windows[layer],
            )
            for start, end in itertools.pairwise(self.bounds)
        ]
        return torch.cat(pieces, dim=2).squeeze(0).transpose(0, 1).reshape(tokens, -1)
