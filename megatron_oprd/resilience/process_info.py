"""Who this process is among the ranks of a run, and where its thread of work stands. No communication."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

import psutil

# A thread whose innermost frame stands in one of these waits for other ranks. On CUDA a collective returns at once, and
# what waits is the next look at a value: `parallel/` looks at what its own collectives have made.
_WAITING = (
    "/torch/distributed/",
    "/megatron/core/pipeline_parallel/p2p_communication.py",
    "/megatron_oprd/parallel/",
)
_NOT_WAITING = ("/torch/distributed/checkpoint/",)  # files


@dataclass(frozen=True)
class Position:
    """The innermost Python frame of a thread."""

    where: str  # file:line in function
    waits: bool  # for other ranks


def rank() -> int:
    """As torchrun numbers the processes; 0 without it."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def local_ranks() -> range:
    """The ranks that the same torchrun started on this machine."""
    first = rank() - int(os.environ.get("LOCAL_RANK", "0"))
    return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def attempt() -> int:
    """How often torchrun has started this group of processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def host() -> str:
    return socket.gethostname()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that ended and that nobody has asked after does not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def waits_for_others(file: str) -> bool:
    """Whether code of this file, called last, waits for other ranks."""
    file = file.replace(os.sep, "/")
    return any(part in file for part in _WAITING) and not any(part in file for part in _NOT_WAITING)


def position(thread: int) -> Position:
    """Where a thread of this process, by its identifier, stands now."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return Position("(ended)", False)
    file = frame.f_code.co_filename
    short = "/".join(file.replace(os.sep, "/").split("/")[-3:])
    return Position(f"{short}:{frame.f_lineno} in {frame.f_code.co_name}", waits_for_others(file))
