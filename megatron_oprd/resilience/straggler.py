"""Detection of ranks with a slow device, like a throttled GPU or a shared machine: all ranks wait for the slowest."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_oprd.config import WatchdogConfig
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.resilience import process_info

ATTEMPTS = 3  # the fastest counts: a single disturbance does not make a straggler
PRODUCTS = 8


@dataclass(frozen=True)
class Straggler:
    """The slowest rank."""

    rank: int
    ratio: float  # its time over the median of all ranks


def measure_straggler(config: WatchdogConfig, topology: Topology, step: int) -> dict[str, float]:
    """Measure every `watchdog.straggler_every` steps how much slower the slowest rank is than the median rank.

    Rank 0 prints a warning if the ratio is above `watchdog.straggler_ratio`. Communicates over the world.

    Returns: the metric `straggler/ratio`, or no metric after a step without a measurement.
    """
    if not config.straggler_every or step % config.straggler_every:
        return {}
    measured = gather_objects((process_info.host(), time_products(topology.device)), dist.group.WORLD)
    found = slowest([seconds for _, seconds in measured])
    if found.ratio > config.straggler_ratio and topology.rank == 0:
        print(
            f"warning: rank {found.rank} on {measured[found.rank][0]} needs {found.ratio:.2f} times as long as the "
            f"median rank for the same work (watchdog.straggler_ratio={config.straggler_ratio:g})",
            flush=True,
        )
    return {"straggler/ratio": found.ratio}


def slowest(seconds: Sequence[float]) -> Straggler:
    """Return the slowest rank, given the seconds of every rank for the same work, in rank order.

    The lower median is the reference: with two ranks, the faster one.
    """
    rank = max(range(len(seconds)), key=lambda number: seconds[number])
    return Straggler(rank, seconds[rank] / statistics.median_low(seconds))


def time_products(device: torch.device) -> float:
    """Return the seconds for a fixed number of matrix products on this rank's device. No communication."""
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    matrix = torch.full((size, size), 1.0 / size, device=device, dtype=dtype)
    return min(_seconds(matrix) for _ in range(ATTEMPTS))


def _seconds(matrix: torch.Tensor) -> float:
    if matrix.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        _multiply(matrix)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    started = time.perf_counter()
    _multiply(matrix)
    return time.perf_counter() - started


def _multiply(matrix: torch.Tensor) -> None:
    product = matrix
    for _ in range(PRODUCTS):
        product = product @ matrix
