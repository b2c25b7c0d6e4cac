"""The device of this process: its choice, its torch.distributed backend and its memory. No communication.

Importing this module also imports Megatron-Core, by `import_megatron`.
"""

from __future__ import annotations

import contextlib
import os
import resource

import psutil
import torch

from megatron_oprd.runtime.megatron_import import import_megatron
from megatron_oprd.types import UserError

import_megatron()


def choose_device(requested: str) -> torch.device:
    """Return the device of this process. With CUDA that is the device with the number of the local rank.

    Args:
        requested: the value of `train.device`: auto, cpu or cuda.

    Raises:
        UserError: the machine does not have the requested device, or not one for each process, or cpu is requested
            while CUDA is visible.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: this machine has no CUDA device; use train.device=cpu or auto")
    if requested == "cpu" and torch.cuda.is_available():
        raise UserError(
            "train.device=cpu: hide the CUDA devices first (CUDA_VISIBLE_DEVICES=''), Megatron-Core takes them"
        )
    if torch.cuda.is_available():
        local_rank, devices = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= devices:
            processes = os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1)
            raise UserError(
                f"{processes} processes on this machine share {devices} visible CUDA devices, and each needs its own; "
                f"use torchrun --nproc-per-node={devices} or name more devices in CUDA_VISIBLE_DEVICES"
            )
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def distributed_backend(device: torch.device) -> str:
    """Return the torch.distributed backend of a device: nccl for CUDA, gloo for the CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


def free_memory_bytes(device: torch.device) -> int:
    """Return the free bytes of the CUDA device, or this process's share of the free bytes of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def release_cached_memory(device: torch.device) -> None:
    """Give the freed memory that torch caches back to the CUDA device, so that `free_memory_bytes` counts it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Start the measurement that `peak_memory_bytes` ends."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: resets the high-water mark of resident memory


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes in use since `reset_peak_memory`.

    With CUDA these are the bytes that torch allocated on the device, on a CPU the resident bytes of the process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
