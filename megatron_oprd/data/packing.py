"""Rollouts to packed micro-batches. Pure, no communication: the global counts come in as an argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_oprd.config import RepresentationConfig
from megatron_oprd.losses.positions import select_positions
from megatron_oprd.losses.reduction import token_weight
from megatron_oprd.types import GlobalCounts, PackedBatch, Rollout, UserError


def selected_per_rollout(rollouts: Sequence[Rollout], config: RepresentationConfig) -> list[int]:
    """How many tokens of each rollout the loss reads."""
    return [len(select_positions(rollout.response_mask, config.positions, config.k)) for rollout in rollouts]


def pack(
    rollouts: Sequence[Rollout],
    config: RepresentationConfig,
    counts: GlobalCounts,
    *,
    max_tokens_per_micro_batch: int,
    pad_to_multiple: int = 1,
    pad_id: int = 0,
) -> list[PackedBatch]:
    """Micro-batches of whole sequences, each at most `max_tokens_per_micro_batch` long, filled longest first.

    Rollouts without a selected token contribute nothing and are left out. Raises UserError for a rollout that does not
    fit. The order of the result depends on the lengths alone.
    """
    useful = [rollout for rollout, n in zip(rollouts, selected_per_rollout(rollouts, config), strict=True) if n]
    bins: list[list[Rollout]] = []
    room: list[int] = []
    for rollout in sorted(useful, key=_length, reverse=True):
        length = _length(rollout)
        if length > max_tokens_per_micro_batch:
            raise UserError(
                f"batch.max_tokens_per_micro_batch={max_tokens_per_micro_batch} is less than a rollout of {length} "
                "tokens; raise it or lower rollout.max_new_tokens"
            )
        place = next((i for i, left in enumerate(room) if left >= length), None)
        if place is None:
            bins.append([])
            room.append(max_tokens_per_micro_batch)
            place = len(bins) - 1
        bins[place].append(rollout)
        room[place] -= length
    return [_lay_out(members, config, counts, pad_to_multiple, pad_id) for members in bins]


def empty_batch(pad_to_multiple: int = 1, pad_id: int = 0) -> PackedBatch:
    """A micro-batch of padding alone, for a rank with fewer micro-batches than its data-parallel peers: the pipeline
    schedule needs the same number everywhere."""
    counts = GlobalCounts(sequences=0, tokens=0, empty=0)
    return _lay_out([], RepresentationConfig(), counts, pad_to_multiple, pad_id)


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The micro-batch with every tensor on `device`."""
    moved = {
        field.name: getattr(batch, field.name).to(device, non_blocking=True) for field in dataclasses.fields(batch)
    }
    return PackedBatch(**moved)


def _length(rollout: Rollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.response_ids)


def _lay_out(
    rollouts: Sequence[Rollout], config: RepresentationConfig, counts: GlobalCounts, pad_to_multiple: int, pad_id: int
) -> PackedBatch:
    tokens: list[int] = []
    positions: list[int] = []
    response: list[bool] = []
    sequence_ids: list[int] = []
    selected: list[int] = []
    weights: list[float] = []
    bounds = [0]
    for number, rollout in enumerate(rollouts):
        first_response_row = len(tokens) + len(rollout.prompt_ids)
        chosen = select_positions(rollout.response_mask, config.positions, config.k)
        # The state of token t is where t has been read; shift -1 takes the state that predicted it.
        selected += [first_response_row + index + config.shift for index in chosen]
        weights += [token_weight(len(chosen), counts, config.aggregation)] * len(chosen)
        tokens += [*rollout.prompt_ids, *rollout.response_ids]
        positions += range(_length(rollout))
        response += [False] * len(rollout.prompt_ids) + [flag == 1 for flag in rollout.response_mask]
        sequence_ids += [number] * _length(rollout)
        bounds.append(len(tokens))
    padding = -len(tokens) % pad_to_multiple if tokens else pad_to_multiple
    if padding:
        tokens += [pad_id] * padding
        positions += range(padding)
        response += [False] * padding
        sequence_ids += [len(rollouts)] * padding
        bounds.append(len(tokens))
    return PackedBatch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        position_ids=torch.tensor(positions, dtype=torch.int64),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        response_mask=torch.tensor(response, dtype=torch.bool),
        sequence_ids=torch.tensor(sequence_ids, dtype=torch.int64),
        selected=torch.tensor(selected, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float64),
    )
