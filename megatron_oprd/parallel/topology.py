"""The layout of the processes: sizes, ranks and process groups.

This is the only module that uses megatron.core.parallel_state. All others get a `Topology` or a process group.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.rendezvous import rendezvous

from megatron_oprd.config import ParallelConfig, WatchdogConfig
from megatron_oprd.runtime import cpu_stand_ins, platform
from megatron_oprd.runtime.host_memory import return_freed_memory
from megatron_oprd.types import UserError

# Default time that ranks wait for each other. It is long because data-parallel ranks finish their rollouts at different
# times.
TIMEOUT_SECONDS = 1800.0

# The topologies of this process group. They are reused, because Megatron never destroys a process group, and the
# threads of gloo groups keep waking up.
_topologies: dict[tuple[Any, ParallelConfig, torch.device], Topology] = {}


@dataclass(frozen=True)
class Topology:
    """The sizes, the ranks of this process and the process groups of one layout.

    The global rank counts tensor, context, data and pipeline ranks, tensor ranks fastest. Expert parallelism divides
    the experts over the tensor x context x data ranks of a pipeline stage; no expert is split.
    """

    world_size: int
    rank: int
    tensor_size: int
    tensor_rank: int
    context_size: int
    context_rank: int
    pipeline_size: int
    pipeline_rank: int
    data_size: int
    data_rank: int
    expert_size: int
    expert_rank: int
    virtual_size: int  # chunks of the model on each pipeline rank; chunk c of rank p is stage c * pipeline_size + p
    sequence_parallel: bool
    device: torch.device
    groups: ProcessGroupCollection
    megatron_state: dict[str, Any] = field(repr=False)  # the variables of parallel_state while this layout is active

    @property
    def num_stages(self) -> int:
        """Return the number of pipeline stages of all ranks (virtual stages counted separately)."""
        return self.pipeline_size * self.virtual_size

    @property
    def stages(self) -> tuple[int, ...]:
        """Return the pipeline stages of this rank, one for each model chunk."""
        return tuple(range(self.pipeline_rank, self.num_stages, self.pipeline_size))

    @property
    def replica_rank(self) -> int:
        """Return the index of this rank's replica. Each data- and context-parallel rank generates its own rollouts."""
        return self.data_rank * self.context_size + self.context_rank

    @property
    def num_replicas(self) -> int:
        """Return the number of replicas that generate rollouts."""
        return self.data_size * self.context_size

    @property
    def token_groups(self) -> list[dist.ProcessGroup]:
        """Return the process groups whose ranks have different tokens of the same layers.

        A sum over tokens is complete after a sum over these groups. They contain the tensor-parallel group only under
        sequence parallelism; otherwise each tensor-parallel rank has every token.
        """
        groups = [self.groups.dp_cp]
        return [*groups, self.groups.tp] if self.sequence_parallel else groups

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this layout the active one inside the block. No communication.

        Megatron-Core uses the global variables of parallel_state when a model is built and when it runs, so two layouts
        in one process have to take turns.
        """
        before = _megatron_state()
        _set_megatron_state(self.megatron_state)
        try:
            yield
        finally:
            _set_megatron_state(before)


def collective_timeout(watchdog: WatchdogConfig) -> float:
    """Return the seconds after which a collective fails.

    With heartbeats this is twice the time-out of the watchdog. The watchdog can tell a slow rank from one that hangs,
    so its report should come first.
    """
    return watchdog.timeout_seconds * (2 if watchdog.heartbeat_seconds else 1)


def start_process(device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Initialize torch.distributed from torchrun's environment, or as a single process without torchrun.

    Does nothing if it is initialized. After `timeout_seconds` without an answer from another rank, a collective fails.
    """
    cpu_stand_ins.install()
    if dist.is_initialized():
        return
    if device.type == "cpu":
        return_freed_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Let an error or a time-out of NCCL end the process without waiting for communicators that may hang.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = platform.distributed_backend(device)
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(
            backend, store=_store_of_attempt(store), rank=rank, world_size=world_size, timeout=timeout
        )
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if backend == "gloo":
        atexit.register(_destroy_groups)


def _store_of_attempt(store: dist.Store) -> dist.Store:
    """Return a store in which restarted processes do not find the addresses of the dead ones.

    The store of torchrun survives its processes. On one machine each attempt gets a prefix of its own; the torchruns
    of several machines count attempts differently, so there the user has to set an environment variable.
    """
    machines, restarts = (int(os.environ.get(name, "0")) for name in ("GROUP_WORLD_SIZE", "TORCHELASTIC_MAX_RESTARTS"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not restarts:
        return store
    if machines > 1 and os.environ["RANK"] == "0":
        print(
            "warning: torchrun --max-restarts on several machines starts no second attempt without "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment",
            flush=True,
        )
    return store if machines > 1 else dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def _destroy_groups() -> None:
    """End the threads of gloo before Python exits; a thread that is cut off aborts a process that had finished."""
    _topologies.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def build_topology(
    parallel: ParallelConfig, device: torch.device, seed: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> Topology:
    """Create Megatron's process groups for a layout, seed its generators and make the layout active.

    Collective over the world. Earlier topologies stay usable through their `active`, and a layout that was built
    before is returned again. Raises UserError if the layout does not fit the number of processes.
    """
    check_layout(parallel, dist.get_world_size())
    world, layout = dist.group.WORLD, parallel.model_copy(update={"distributed_optimizer": True})
    if any(key[0] is not world for key in _topologies):  # torch.distributed was initialized anew
        _topologies.clear()
    topology = _topologies.get((world, layout, device)) or _create_topology(layout, device, timeout_seconds)
    _topologies[world, layout, device] = topology
    _set_megatron_state(topology.megatron_state)
    with cpu_stand_ins.cpu_devices():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return topology


def _create_topology(parallel: ParallelConfig, device: torch.device, timeout_seconds: float) -> Topology:
    """Create the process groups of a layout and make the layout active."""
    _set_megatron_state(_NO_LAYOUT)
    with cpu_stand_ins.cpu_devices():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
            distributed_timeout_minutes=timeout_seconds / 60,
        )
    return Topology(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        tensor_size=parallel.tensor,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        context_size=parallel.context,
        context_rank=parallel_state.get_context_parallel_rank(),
        pipeline_size=parallel.pipeline,
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_size=parallel_state.get_data_parallel_world_size(),
        data_rank=parallel_state.get_data_parallel_rank(),
        expert_size=parallel.expert,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        virtual_size=parallel.virtual_pipeline or 1,
        sequence_parallel=parallel.sequence,
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        megatron_state=_megatron_state(),
    )


def check_layout(parallel: ParallelConfig, world_size: int, key: str = "parallel") -> None:
    """Raise UserError, naming what would work, for an impossible layout or one that does not divide the processes.

    Args:
        parallel: the layout.
        world_size: the number of processes.
        key: the section of the configuration that contains the layout.
    """
    size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % size:
        context = f" x {key}.context={parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"{key}.tensor={parallel.tensor} x {key}.pipeline={parallel.pipeline}{context} needs a multiple of {size} "
            f"processes, not {world_size}; start torchrun with --nproc-per-node {size}"
        )
    if parallel.virtual_pipeline and parallel.pipeline == 1:
        raise UserError(
            f"{key}.virtual_pipeline={parallel.virtual_pipeline} interleaves pipeline stages and {key}.pipeline is 1; "
            f"use {key}.pipeline of at least 2 or {key}.virtual_pipeline=null"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            f"{key}.sequence=true divides activations over tensor-parallel ranks and {key}.tensor is 1; use "
            f"{key}.tensor of at least 2 or {key}.sequence=false"
        )
    stage = world_size // parallel.pipeline
    if stage % parallel.expert:
        works = ", ".join(str(n) for n in range(1, stage + 1) if stage % n == 0)
        raise UserError(
            f"{key}.expert={parallel.expert} does not divide the {stage} processes of a pipeline stage; use one of "
            f"{works}"
        )


def _megatron_state() -> dict[str, Any]:
    """Return the global variables of parallel_state: names like `_TENSOR_MODEL_PARALLEL_GROUP`."""
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name[1:2].isupper() and not isinstance(value, ModuleType | FunctionType | type)
    }


def _set_megatron_state(state: dict[str, Any]) -> None:
    vars(parallel_state).update(state)


_NO_LAYOUT = _megatron_state()
