"""Move rows of hidden states from the ranks that computed them to the ranks that need them.

Every rank knows which rows each rank has and needs. Therefore every rank plans the whole exchange by itself, and all
ranks find the same plan.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_oprd.types import StateKey


@dataclass(frozen=True)
class Shard:
    """The hidden states that one rank has, or needs: every layer of `layers` at every row of `rows`."""

    layers: tuple[StateKey, ...]  # of the teacher, ascending; FINAL_STATES stands alone
    rows: torch.Tensor  # [n] int64, CPU: numbers of selected tokens of the global batch, in any order, no duplicates


@dataclass(frozen=True)
class Transfer:
    """A message between two different global ranks: every layer of `layers` at every row of `rows`."""

    source: int
    target: int
    layers: tuple[StateKey, ...]  # ascending
    rows: torch.Tensor  # [m] int64, CPU: numbers of selected tokens of the global batch


@dataclass(frozen=True)
class TargetShape:
    """The format of one row of one layer."""

    width: int
    dtype: torch.dtype


@dataclass(frozen=True)
class RankExchange:
    """The part of a rank in an exchange, and the plan of all ranks."""

    rank: int  # global
    available: Shard  # what this rank has
    needed: Shard  # what this rank needs
    transfers: Sequence[Transfer]  # of all ranks


def plan_transfers(available: Sequence[Shard], needed: Sequence[Shard]) -> list[Transfer]:
    """Decide which rank sends which rows to which rank. No communication; the same result on every rank.

    A rank keeps the rows that it both has and needs. Every other row that it needs arrives exactly once. Among the
    ranks that have a row, the source is in the smallest aligned block of 2^k ranks that also contains the target:
    on the same node if possible. Among several such ranks, the source is the one with the least to send so far, so
    that tensor-parallel replicas share the work.

    Args:
        available: what each global rank has.
        needed: what each global rank needs.

    Raises:
        ValueError: no rank has a needed row, or the lists have different lengths.
    """
    if len(available) != len(needed):
        raise ValueError(f"{len(available)} ranks hold states and {len(needed)} want them: not the same ranks")
    num_rows = 1 + max((int(shard.rows.max()) for shard in [*available, *needed] if len(shard.rows)), default=-1)
    part_of_row, holders = _partition(available, num_rows)

    @functools.cache
    def sources(
        part: int, layers: tuple[StateKey, ...], own: tuple[StateKey, ...]
    ) -> list[tuple[tuple[int, ...], list[StateKey]]]:
        by_candidates: dict[tuple[int, ...], list[StateKey]] = defaultdict(list)
        for layer in sorted(set(layers) - set(own)):
            by_candidates[tuple(rank for rank in holders[part] if layer in available[rank].layers)].append(layer)
        return list(by_candidates.items())

    transfers: list[Transfer] = []
    load = [0] * len(available)
    for rows, targets in _ranks_by_rows(needed):
        pieces = _split_by_part(rows, part_of_row)
        for target in targets:
            layers_from: dict[tuple[int, int], list[int]] = defaultdict(list)
            for number, (part, piece) in enumerate(pieces):
                own = available[target].layers if target in holders[part] else ()
                for candidates, layers in sources(part, needed[target].layers, own):
                    if not candidates:
                        raise ValueError(
                            f"rank {target} wants layer {layers[0]} of row {int(piece[0])}, which no rank holds"
                        )
                    source = _nearest(candidates, target, load)
                    load[source] += len(layers) * len(piece)
                    layers_from[source, number] += layers
            rows_from: dict[tuple[int, tuple[int, ...]], list[torch.Tensor]] = defaultdict(list)
            for (source, number), layers in layers_from.items():
                rows_from[source, tuple(sorted(layers))].append(pieces[number][1])
            transfers += [Transfer(source, target, layers, torch.cat(r)) for (source, layers), r in rows_from.items()]
    return sorted(transfers, key=lambda transfer: (transfer.target, transfer.source, transfer.layers))


def moved_bytes(transfers: Sequence[Transfer], row_bytes: int) -> int:
    """Return the bytes that all ranks together send, if one row of one layer has `row_bytes`."""
    return row_bytes * sum(len(transfer.layers) * len(transfer.rows) for transfer in transfers)


def minimum_rows(available: Sequence[Shard], needed: Sequence[Shard]) -> int:
    """Return the number of (layer, row) pairs that ranks need and do not have, summed over ranks.

    No plan moves fewer.
    """
    total = 0
    for has, needs in zip(available, needed, strict=True):
        missing = int((~torch.isin(needs.rows, has.rows)).sum())
        total += sum(missing if layer in has.layers else len(needs.rows) for layer in needs.layers)
    return total


def exchange(
    states: dict[StateKey, torch.Tensor],
    plan: RankExchange,
    shape: TargetShape,
    device: torch.device,
    target_device: torch.device | None = None,
) -> dict[StateKey, torch.Tensor]:
    """Send and receive this rank's rows.

    Memory: while messages travel, `device` holds all messages that this rank sends and receives, beside the states.
    While the result is filled, `device` holds the received messages alone. Each one is freed once it is copied. A
    message and its copy are both on `device` for a moment, unless `target_device` is the CPU.

    Args:
        states: layer -> [len(plan.available.rows), width], on any device.
        plan: every rank of the world calls this with the same transfers.
        shape: width and dtype of a row.
        device: messages are made here.
        target_device: the result is made here; by default `device`.

    Returns: layer -> [len(plan.needed.rows), width], rows in the order of `plan.needed.rows`.
    Communicates over: the world group, point to point: one message [layers, rows, width] for each transfer of this
    rank. A rank without transfers communicates nothing. (NCCL needs an earlier collective over the world.)

    Raises:
        ValueError: before anything is sent, if the transfers to this rank are not what it lacks, or if they name rows
            that this rank neither has nor needs.
    """
    available, needed, rank = plan.available, plan.needed, plan.rank
    sorted_available, sorted_needed = available.rows.sort(), needed.rows.sort()
    outgoing = [
        (transfer, _places(transfer.rows, sorted_available)) for transfer in plan.transfers if transfer.source == rank
    ]
    incoming = [
        (transfer, _places(transfer.rows, sorted_needed)) for transfer in plan.transfers if transfer.target == rank
    ]
    kept_layers = set(needed.layers) & set(available.layers)
    kept = torch.isin(needed.rows, available.rows).nonzero().flatten()
    missing = len(needed.layers) * len(needed.rows) - len(kept_layers) * len(kept)
    if missing != moved_bytes([transfer for transfer, _ in incoming], 1):
        raise ValueError(f"the transfers to rank {rank} are not the {missing} rows of single layers that it lacks")

    received = _communicate(states, outgoing, [transfer for transfer, _ in incoming], shape, device)
    result_shape, result_device = (len(needed.rows), shape.width), device if target_device is None else target_device
    result = {layer: torch.empty(result_shape, dtype=shape.dtype, device=result_device) for layer in needed.layers}
    kept_places = _places(needed.rows[kept], sorted_available)
    for layer in kept_layers:
        result[layer][kept] = states[layer][kept_places].to(result_device, shape.dtype)
    while received:
        message = received.pop()
        transfer, places = incoming.pop()
        for number, layer in enumerate(transfer.layers):
            result[layer][places] = message[number].to(result_device)
    return result


def _partition(available: Sequence[Shard], num_rows: int) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Divide the rows into parts such that each rank has all rows of a part or none.

    Returns: the part [num_rows] int32 of each row, and the ranks that have each part.
    """
    part_of_row = torch.zeros(num_rows, dtype=torch.int32)
    holders: list[tuple[int, ...]] = [()]
    for rows, ranks in _ranks_by_rows(available):
        old, new = part_of_row[rows].unique(return_inverse=True)
        part_of_row[rows] = (len(holders) + new).to(torch.int32)
        holders += [holders[part] + ranks for part in old.tolist()]
    return part_of_row, holders


def _ranks_by_rows(shards: Sequence[Shard]) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    # The key is a digest: the rows themselves would be a second copy of them.
    ranks: dict[bytes, list[int]] = defaultdict(list)
    for rank, shard in enumerate(shards):
        ranks[hashlib.sha256(shard.rows.numpy().tobytes()).digest()].append(rank)
    return [(shards[same[0]].rows, tuple(same)) for same in ranks.values()]


def _split_by_part(rows: torch.Tensor, part_of_row: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    parts, order = part_of_row[rows].sort(stable=True)
    numbers, counts = parts.unique_consecutive(return_counts=True)
    return list(zip(numbers.tolist(), rows[order].split(counts.tolist()), strict=True))


def _nearest(candidates: Sequence[int], target: int, load: Sequence[int]) -> int:
    return min(candidates, key=lambda rank: ((rank ^ target).bit_length(), load[rank], rank))


def _places(rows: torch.Tensor, within: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the place of each row in a list. `within`: the list's sorted values, and the place of each of them."""
    ascending, places = within
    at = torch.searchsorted(ascending, rows).clamp(max=max(len(ascending) - 1, 0))
    if len(rows) and (not len(ascending) or not torch.equal(ascending[at], rows)):
        raise ValueError("a transfer names rows that its source does not hold or its target does not want")
    return places[at]


def _communicate(
    states: dict[StateKey, torch.Tensor],
    outgoing: Sequence[tuple[Transfer, torch.Tensor]],
    incoming: Sequence[Transfer],
    shape: TargetShape,
    device: torch.device,
) -> list[torch.Tensor]:
    """Return the message of each incoming transfer.

    Several messages between the same two ranks match by their order in the plan.
    """
    received = [
        torch.empty(len(t.layers), len(t.rows), shape.width, dtype=shape.dtype, device=device) for t in incoming
    ]
    operations = [
        dist.P2POp(dist.irecv, message, transfer.source) for transfer, message in zip(incoming, received, strict=True)
    ]
    for transfer, places in outgoing:
        message = torch.empty(len(transfer.layers), len(places), shape.width, dtype=shape.dtype, device=device)
        for number, layer in enumerate(transfer.layers):
            message[number] = states[layer][places]
        operations.append(dist.P2POp(dist.isend, message, transfer.target))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received
