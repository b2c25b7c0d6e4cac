"""Handlers of SIGTERM and SIGUSR1, by which a cluster asks a run to save and to free its machines.

A handler only stores the signal's number. Between two steps the ranks agree whether any of them received a signal.
"""

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
_received = 0


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Finish the current step on SIGTERM or SIGUSR1, then stop.

    Inside the block a signal does not end the process: the training loop calls `received_by_any` after each step. In
    a thread other than the main one the block changes nothing. No communication.
    """
    global _received
    _received = 0
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    before = {number: signal.signal(number, _store) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received_by_any(topology: Topology) -> str | None:
    """Return the name of a signal that any rank received, or None, on every rank. Collective over the world."""
    (number,) = max_over([_received], dist.group.WORLD, topology.device)
    return signal.Signals(int(number)).name if number else None


def _store(number: int, frame: FrameType | None) -> None:
    global _received
    _received = number
