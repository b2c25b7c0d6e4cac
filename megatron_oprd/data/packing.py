"""Rollouts to packed micro-batches. Pure, no communication: the global counts come in as an argument."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from megatron_oprd.config import RepresentationConfig
from megatron_oprd.losses.positions import select_positions
from megatron_oprd.losses.reduction import token_weight
from megatron_oprd.types import GlobalCounts, PackedBatch, Rollout


def selected_per_rollout(rollouts: Sequence[Rollout], config: RepresentationConfig) -> list[int]:
    """How many tokens of each rollout the loss reads."""
    return [len(select_positions(rollout.response_mask, config.positions, config.k)) for rollout in rollouts]


def pack(
    rollouts: Sequence[Rollout],
    first_rows: Sequence[int],
    config: RepresentationConfig,
    counts: GlobalCounts,
    *,
    sequence_multiple: int = 1,
    batch_multiple: int = 1,
    pad_id: int = 0,
) -> PackedBatch:
    """One micro-batch of whole sequences, laid end to end; none at all make one of padding alone, for a rank that has
    nothing to do while the schedule needs a micro-batch everywhere.

    Every rollout has a selected token; `first_rows`: the global number of each one's first. Each sequence is padded at
    its end to a multiple of `sequence_multiple` (context parallelism), the whole by a sequence of padding to one of
    `batch_multiple` (sequence parallelism), itself a multiple of `sequence_multiple`.
    """
    tokens: list[int] = []
    positions: list[int] = []
    response: list[bool] = []
    sequence_ids: list[int] = []
    selected: list[int] = []
    rows: list[int] = []
    weights: list[float] = []
    bounds = [0]
    for number, (rollout, first_row) in enumerate(zip(rollouts, first_rows, strict=True)):
        first_response_row = len(tokens) + len(rollout.prompt_ids)
        chosen = select_positions(rollout.response_mask, config.positions, config.k)
        # The state of token t is where t has been read; shift -1 takes the state that predicted it.
        selected += [first_response_row + index + config.shift for index in chosen]
        rows += range(first_row, first_row + len(chosen))
        weights += [token_weight(len(chosen), counts, config.aggregation)] * len(chosen)
        padding = -num_tokens(rollout) % sequence_multiple
        tokens += [*rollout.prompt_ids, *rollout.response_ids, *[pad_id] * padding]
        response += [False] * len(rollout.prompt_ids)
        response += [flag == 1 for flag in rollout.response_mask] + [False] * padding
        positions += range(num_tokens(rollout) + padding)
        sequence_ids += [number] * (num_tokens(rollout) + padding)
        bounds.append(len(tokens))
    padding = -len(tokens) % batch_multiple if tokens else batch_multiple
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
        rows=torch.tensor(rows, dtype=torch.int64),
        weights=torch.tensor(weights, dtype=torch.float64),
        context_order=torch.arange(len(tokens)),
    )


def to_device(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The micro-batch with every tensor on `device`."""
    moved = {
        field.name: getattr(batch, field.name).to(device, non_blocking=True) for field in dataclasses.fields(batch)
    }
    return PackedBatch(**moved)


def num_tokens(rollout: Rollout) -> int:
    """Tokens of a rollout, prompt and response."""
    return len(rollout.prompt_ids) + len(rollout.response_ids)
