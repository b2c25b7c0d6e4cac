"""Where this rank stands: the only reader of megatron.core.parallel_state. All else gets a `Topology` or a group."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_oprd import platform
from megatron_oprd.config import ParallelConfig
from megatron_oprd.types import UserError

# How long ranks wait for each other. Data-parallel ranks end their rollouts at different times.
TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Topology:
    """Sizes, this rank's place in each and the process groups of one layout."""

    world_size: int
    rank: int
    tensor_size: int
    tensor_rank: int
    pipeline_size: int
    pipeline_rank: int
    data_size: int
    data_rank: int
    device: torch.device
    groups: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline_size - 1


def start_process(device: torch.device, timeout_seconds: int = TIMEOUT_SECONDS) -> None:
    """Join torch.distributed as torchrun describes it, or alone without torchrun. A time-out turns a dead rank into
    an error on the others instead of a wait without end."""
    platform.install_cpu_stand_ins()
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = platform.distributed_backend(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def build_topology(parallel: ParallelConfig, device: torch.device, seed: int) -> Topology:
    """Make Megatron's process groups for a layout and seed its generators. Collective over the world.

    Raises UserError when the layout does not fit the number of processes.
    """
    check_layout(parallel, dist.get_world_size())
    parallel_state.destroy_model_parallel()  # an earlier layout of this process, if any
    with platform.cpu_devices():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            distributed_timeout_minutes=TIMEOUT_SECONDS // 60,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor_size=parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_size=parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def check_layout(parallel: ParallelConfig, world_size: int) -> None:
    """Raise UserError for a layout that this version cannot run or that does not divide the processes."""
    if parallel.context > 1 or parallel.expert > 1 or parallel.virtual_pipeline or parallel.sequence:
        raise UserError(
            "parallel: context, expert, virtual_pipeline and sequence are not supported yet; use tensor, pipeline"
        )
    size = parallel.tensor * parallel.pipeline
    if world_size % size:
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} needs a multiple of {size} "
            f"processes, not {world_size}; start torchrun with --nproc-per-node {size}"
        )
