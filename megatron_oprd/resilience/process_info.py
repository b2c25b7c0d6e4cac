"""The identity of this process among the ranks of a run, and the current position of its threads. No communication."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

import psutil

# A thread waits for other ranks if its innermost frame is in one of these files. On CUDA a collective returns at once;
# the thread waits when it next copies a value to the host, and `parallel/` copies the results of its collectives.
_WAITING = (
    "/torch/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron_oprd/parallel/",
)
_NOT_WAITING = ("/torch/distributed/checkpoint/",)  # writes and reads files


@dataclass(frozen=True)
class Position:
    """The innermost Python frame of a thread."""

    where: str  # "file:line in function"
    waits: bool  # True if the frame's file is code that waits for other ranks


def rank() -> int:
    """Return the rank that torchrun gave this process; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_ranks() -> range:
    """Return the ranks that the same torchrun started on this machine."""
    first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def attempt() -> int:
    """Return how many times torchrun has restarted this group of processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def host() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Return True if a process of this machine runs. A zombie process (ended, not yet waited for) counts as dead."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def waits_for_other_ranks(file: str) -> bool:
    """Return True if a thread whose innermost frame is in this file waits for other ranks."""
    file = file.replace(os.sep, "/")
    return any(part in file for part in _WAITING) and not any(part in file for part in _NOT_WAITING)


def position(thread: int) -> Position:
    """Return the current position of a thread of this process, given its identifier."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return Position("(ended)", False)
    file = frame.f_code.co_filename
    short = "/".join(file.replace(os.sep, "/").split("/")[-3:])
    return Position(f"{short}:{frame.f_lineno} in {frame.f_code.co_name}", waits_for_other_ranks(file))
