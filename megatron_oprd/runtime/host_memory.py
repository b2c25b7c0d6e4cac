"""Memory of the host and of this process on a CPU. No communication."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil

# The limits of a control group: the file of each version, and the folder of its hierarchy below /sys/fs/cgroup.
_LIMITS = {"": ("memory.max", ""), "memory": ("memory.limit_in_bytes", "memory")}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h
_LARGE_BLOCK = 256 * 1024  # bytes


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Return the bytes that the processes of this host may use: the machine's memory, or the control group's limit.

    `root` is the folder that contains `proc` and `sys`.
    """
    return min([psutil.virtual_memory().total, *_group_limits(root)])


def resident_bytes() -> int:
    """Return the resident bytes of this process."""
    return psutil.Process().memory_info().rss


def return_freed_memory() -> None:
    """Let malloc map each block of 256 KiB or more by itself, so that freed tensors go back to the machine.

    Without this, glibc raises the limit up to 32 MiB. The holes between live tensors then stay with the process: 16 %
    of the memory of a run with 135 M parameters. No effect without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _LARGE_BLOCK)


def _group_limits(root: Path) -> list[int]:
    """Return the limits of the control group of this process and of the groups around it."""
    limits: list[int] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return limits
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in _LIMITS:
            continue
        name, hierarchy = _LIMITS[controllers]
        folder = root / "sys/fs/cgroup" / hierarchy
        own = folder / path.lstrip("/")
        for group in (own, *own.parents):
            if group == folder.parent:
                break
            try:
                text = (group / name).read_text().strip()
            except OSError:
                continue
            if text != "max":
                limits.append(int(text))
    return limits
