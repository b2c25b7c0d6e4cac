"""The device that a plan is made for: this machine's, or one that the user names."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import psutil
import torch

from megatron_oprd.config import Config
from megatron_oprd.launch.layouts import planned_world
from megatron_oprd.launch.setup import Setup
from megatron_oprd.models.build import DTYPES
from megatron_oprd.planning.hardware import GPUS, Hardware
from megatron_oprd.runtime import host_memory, platform

GPU_PROCESS_BYTES = 2 * 10**9  # CUDA context, NCCL buffers and fragments of the allocator (assumed)


@dataclass(frozen=True)
class PlanDevice:
    """A device, and the processes that share its memory."""

    kind: Literal["cpu", "gpu"]
    name: str  # with its article, for sentences
    memory: int  # bytes
    sharers: int  # processes that share the memory: those of this host on a CPU, one on a GPU
    process_bytes: int  # of a process besides tensors: libraries on a CPU, CUDA context and buffers on a GPU
    free: int  # bytes of `memory` that no other program uses now
    hardware: Hardware | None  # None: rates are unknown, so times are not estimated
    why: str = ""  # the reason for a device that is not this machine's

    @property
    def share(self) -> int:
        """Return the bytes of each process for tensors."""
        return self.memory // self.sharers - self.process_bytes


def named_gpu(option: str | None, config: Config) -> tuple[str | None, str]:
    """Return the key of `GPUS` that a run is planned for and the reason, or None for this machine's device.

    `option` is the user's choice. Without a choice, more processes than a machine without a GPU has CPU cores are
    planned for H100s.
    """
    if option is not None or torch.cuda.is_available() or config.train.device == "cpu":
        return option, ""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", planned_world(config.parallel, dry_run=True)))
    cores = os.cpu_count() or 1
    if processes <= cores:
        return None, ""
    return "h100", f"this machine has no GPU, and {cores} CPU cores for {processes} processes"


def plan_device(gpu: str | None, why: str, setup: Setup, config: Config) -> PlanDevice:
    """Return the device that a run is planned for.

    Args:
        gpu: A key of `GPUS`, or None: this machine's device; an H100 if the run needs a GPU and the machine has none.
        why: The reason for a GPU that the user has not named.
        setup: The models and the number of processes.
        config: The configuration.
    """
    if gpu is not None:
        return _of_data_sheet(GPUS[gpu], why)
    if platform.choose_device(config.train.device).type == "cuda":
        return _this_gpu()
    if setup.planned_device is not None:
        return _of_data_sheet(GPUS["h100"], "the configuration needs a GPU, and this machine has none")
    memory, processes = host_memory.host_memory_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE", setup.world_size))
    return PlanDevice(
        "cpu",
        f"this machine (CPU, {os.cpu_count()} cores)",
        memory,
        processes,
        host_memory.resident_bytes(),
        min(memory, psutil.virtual_memory().available),
        _measure_cpu(config.precision.dtype, processes),
    )


def _of_data_sheet(hardware: Hardware, why: str = "") -> PlanDevice:
    memory = hardware.memory_size
    return PlanDevice("gpu", f"an {hardware.name}", memory, 1, GPU_PROCESS_BYTES, memory, hardware, why)


def _this_gpu() -> PlanDevice:
    name = torch.cuda.get_device_name()
    known = next((hardware for key, hardware in GPUS.items() if key in name.lower()), None)
    free, memory = torch.cuda.mem_get_info()
    return PlanDevice("gpu", f"this {name}", memory, 1, GPU_PROCESS_BYTES, free, known)


def _measure_cpu(dtype: str, processes: int) -> Hardware:
    """Return the rates of this CPU for each of its processes, from a tenth of a second of products and copies."""
    matrix = torch.rand(1024, 1024).to(DTYPES[dtype])
    flops = 2 * 1024**3 / _seconds(lambda: matrix @ matrix) / processes
    block = torch.zeros(16 * 2**20)
    copied = torch.empty_like(block)
    bandwidth = 2 * block.nbytes / _seconds(lambda: copied.copy_(block)) / processes
    return Hardware(
        "CPU",
        gpus_per_node=processes,
        memory_size=0,
        bf16_flops=flops,
        fp8_flops=flops,
        memory_bytes=bandwidth,
        nvlink_bytes=bandwidth,
        network_bytes=bandwidth,
        matrix_share=0.7,  # of what was just measured
        fp8_share=0.7,
        expert_share=0.5,
        memory_share=1.0,
        layer_seconds=5e-4,
    )


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of `work()` in 50 ms, at least two calls."""
    work()
    times: list[float] = []
    while len(times) < 2 or sum(times) < 0.05:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
