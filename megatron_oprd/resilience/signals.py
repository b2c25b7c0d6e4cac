"""SIGTERM and SIGUSR1 ask a run to save and end: a cluster wants its nodes back. A signal only leaves a note; all ranks
look at their notes together, between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch.distributed as dist

from megatron_oprd.parallel.collectives import max_over
from megatron_oprd.parallel.topology import Topology

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_noted = 0


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Inside the block those signals are noted and do nothing else. No communication."""
    global _noted
    _noted = 0
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield
        return
    before = {number: signal.signal(number, _note) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def noted_by_any(topology: Topology) -> str | None:
    """The name of a signal that any rank has noted, the same on all. Collective over the world."""
    (number,) = max_over([_noted], dist.group.WORLD, topology.device)
    return signal.Signals(int(number)).name if number else None


def _note(number: int, frame: FrameType | None) -> None:
    global _noted
    _noted = number
