"""Move selected rows of teacher hidden states from the teacher's layout to the student's, on the same ranks.

Every rank knows what each rank holds and wants, so each plans the whole exchange by itself and all get the same plan.
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
    """What one rank holds or wants: every layer of `layers` at every row of `rows`."""

    layers: tuple[StateKey, ...]  # of the teacher, ascending; FINAL_STATES stands alone
    rows: torch.Tensor  # [n] int64, CPU: numbers of the step's selected tokens, in this rank's order, no duplicates


@dataclass(frozen=True)
class Transfer:
    """One message: every layer of `layers` at every row of `rows`, between two different global ranks."""

    source: int
    target: int
    layers: tuple[StateKey, ...]  # ascending
    rows: torch.Tensor  # [m] int64, CPU: numbers of the step's selected tokens


def plan_transfers(held: Sequence[Shard], wanted: Sequence[Shard]) -> list[Transfer]:
    """Who sends what to whom; both lists are indexed by global rank. Pure, and the same on every rank.

    A rank that holds a (layer, row) it wants keeps its own; any other arrives exactly once. The source is a holder with
    which the target shares the smallest aligned block of 2^k ranks, so one on the same node if there is any; of several
    such, the one with the least to send so far, so that tensor-parallel replicas share the work.

    Raises ValueError for a wanted (layer, row) that no rank holds, and for lists of different lengths.
    """
    if len(held) != len(wanted):
        raise ValueError(f"{len(held)} ranks hold states and {len(wanted)} want them: not the same ranks")
    size = 1 + max((int(shard.rows.max()) for shard in [*held, *wanted] if len(shard.rows)), default=-1)
    part_of_row, holders = _partition(held, size)

    @functools.cache
    def sources(part: int, layers: tuple[int, ...], own: tuple[int, ...]) -> list[tuple[tuple[int, ...], list[int]]]:
        by_candidates: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for layer in sorted(set(layers) - set(own)):
            by_candidates[tuple(rank for rank in holders[part] if layer in held[rank].layers)].append(layer)
        return list(by_candidates.items())

    transfers: list[Transfer] = []
    load = [0] * len(held)
    for rows, targets in _ranks_by_rows(wanted):
        pieces = _split_by_part(rows, part_of_row)
        for target in targets:
            layers_from: dict[tuple[int, int], list[int]] = defaultdict(list)
            for number, (part, piece) in enumerate(pieces):
                own = held[target].layers if target in holders[part] else ()
                for candidates, layers in sources(part, wanted[target].layers, own):
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
    """Bytes that all ranks together send, `row_bytes` being those of one row of one layer."""
    return row_bytes * sum(len(transfer.layers) * len(transfer.rows) for transfer in transfers)


def minimum_rows(held: Sequence[Shard], wanted: Sequence[Shard]) -> int:
    """The (layer, row) pairs that ranks want and do not hold, summed over ranks: no plan moves fewer."""
    total = 0
    for has, wants in zip(held, wanted, strict=True):
        missing = int((~torch.isin(wants.rows, has.rows)).sum())
        total += sum(missing if layer in has.layers else len(wants.rows) for layer in wants.layers)
    return total


def exchange(
    states: dict[StateKey, torch.Tensor],
    held: Shard,
    wanted: Shard,
    transfers: Sequence[Transfer],
    rank: int,
    *,
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
    target_device: torch.device | None = None,
) -> dict[StateKey, torch.Tensor]:
    """This rank's `states`, {layer: [len(held.rows), hidden]}, become new ones: {layer: [len(wanted.rows), hidden]}.

    `transfers` is the plan of all ranks; every rank of the world calls this with the same one. Messages go point to
    point over the world group, one [layers, rows, hidden] of `dtype` on `device` for each transfer that involves
    `rank`; a rank with none communicates nothing. (NCCL asks that some collective has run over the world before.)
    States may be on any device; the result, its rows in the order of `wanted.rows`, is of `dtype` on `target_device`,
    by default `device`.

    Memory: while they travel, `device` holds this rank's messages, both sent and received, beside the states. While the
    result is filled it holds the received ones alone, and each is freed once copied: as many bytes as arrive, which are
    twice there for a moment if the result is on `device` too. With the CPU as `target_device` it never is.

    Raises ValueError, before anything is sent, if the transfers do not make up what this rank wants, or name rows that
    it neither holds to send nor wants.
    """
    in_held, in_wanted = held.rows.sort(), wanted.rows.sort()
    outgoing = [(transfer, _places(transfer.rows, in_held)) for transfer in transfers if transfer.source == rank]
    incoming = [(transfer, _places(transfer.rows, in_wanted)) for transfer in transfers if transfer.target == rank]
    kept_layers = set(wanted.layers) & set(held.layers)
    kept = torch.isin(wanted.rows, held.rows).nonzero().flatten()
    missing = len(wanted.layers) * len(wanted.rows) - len(kept_layers) * len(kept)
    if missing != moved_bytes([transfer for transfer, _ in incoming], 1):
        raise ValueError(f"the transfers to rank {rank} are not the {missing} rows of single layers that it lacks")

    received = _communicate(states, outgoing, [transfer for transfer, _ in incoming], hidden, dtype, device)
    shape, place = (len(wanted.rows), hidden), device if target_device is None else target_device
    result = {layer: torch.empty(shape, dtype=dtype, device=place) for layer in wanted.layers}
    origin = _places(wanted.rows[kept], in_held)
    for layer in kept_layers:
        result[layer][kept] = states[layer][origin].to(place, dtype)
    while received:
        message = received.pop()
        transfer, places = incoming.pop()
        for number, layer in enumerate(transfer.layers):
            result[layer][places] = message[number].to(place)
    return result


def _partition(held: Sequence[Shard], size: int) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Cut the rows into parts of which each rank holds all or nothing: the part of each row, the ranks of each part."""
    part_of_row = torch.zeros(size, dtype=torch.int32)
    holders: list[tuple[int, ...]] = [()]
    for rows, ranks in _ranks_by_rows(held):
        old, new = part_of_row[rows].unique(return_inverse=True)
        part_of_row[rows] = (len(holders) + new).to(torch.int32)
        holders += [holders[part] + ranks for part in old.tolist()]
    return part_of_row, holders


def _ranks_by_rows(shards: Sequence[Shard]) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    # By digest: the rows themselves as keys would be a second copy of all of them.
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
    """Where each row stands in a list of which `within` is the sorted values and their places."""
    ascending, places = within
    at = torch.searchsorted(ascending, rows).clamp(max=max(len(ascending) - 1, 0))
    if len(rows) and (not len(ascending) or not torch.equal(ascending[at], rows)):
        raise ValueError("a transfer names rows that its source does not hold or its target does not want")
    return places[at]


def _communicate(
    states: dict[StateKey, torch.Tensor],
    outgoing: Sequence[tuple[Transfer, torch.Tensor]],
    incoming: Sequence[Transfer],
    hidden: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[torch.Tensor]:
    """The message of each incoming transfer. Those of one pair of ranks match by their order in the plan."""
    received = [torch.empty(len(t.layers), len(t.rows), hidden, dtype=dtype, device=device) for t in incoming]
    operations = [
        dist.P2POp(dist.irecv, message, transfer.source) for transfer, message in zip(incoming, received, strict=True)
    ]
    for transfer, places in outgoing:
        message = torch.empty(len(transfer.layers), len(places), hidden, dtype=dtype, device=device)
        for number, layer in enumerate(transfer.layers):
            message[number] = states[layer][places]
        operations.append(dist.P2POp(dist.isend, message, transfer.target))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received
