"""Handlers of the signals that ask a run to save and stop: SIGTERM, SIGUSR1 (clusters) and SIGINT (Ctrl-C).

A handler stores the signal's number and prints what follows. Between two steps the ranks agree whether any of them
received a signal.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch.distributed as dist

from megatron_oprd.parallel.collectives import max_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.resilience import process_info
from megatron_oprd.runtime import progress

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_received = 0
_checked_step = 0  # the last step after which the ranks looked for a signal


@contextlib.contextmanager
def handle_signals() -> Iterator[None]:
    """Finish the current step on SIGTERM, SIGUSR1 or Ctrl-C, then stop. A second Ctrl-C ends the process at once.

    Inside the block a signal does not end the process: the training loop calls `received_by_any` after each step. In
    a thread other than the main one the block changes nothing. No communication.
    """
    global _received, _checked_step
    _received = _checked_step = 0
    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    before = {number: signal.signal(number, _store) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received_by_any(topology: Topology, step: int) -> str | None:
    """Return the name of a signal that any rank received up to `step`, or None, on every rank.

    Collective over the world.
    """
    global _checked_step
    _checked_step = step
    (number,) = max_over([_received], dist.group.WORLD, topology.device)
    return signal.Signals(int(number)).name if number else None


def _store(number: int, frame: FrameType | None) -> None:
    global _received
    is_first, _received = not _received, number
    if number == signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second Ctrl-C ends the process, even inside a C function
        if "TORCHELASTIC_RUN_ID" in os.environ:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun sends SIGTERM to its ranks at a second Ctrl-C
    if process_info.rank() == 0 and (is_first or number == signal.SIGINT):
        os.write(1, _announcement(number).encode())  # unbuffered: the main thread may be inside a print


def _announcement(number: int) -> str:
    step = max(progress.here().step or 0, _checked_step + 1 if _checked_step else 0)
    saves = (
        f"{signal.Signals(number).name}: the run saves after {f'step {step}' if step else 'its first step'} and stops"
    )
    return f"{saves}; press Ctrl-C again to stop now\n" if number == signal.SIGINT else f"{saves}\n"
