"""Where this rank stands: the only reader of megatron.core.parallel_state. All else gets a `Topology` or a group."""

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
from megatron_oprd.types import UserError

# How long ranks wait for each other, if nothing else is said. Data-parallel ranks end their rollouts at other times.
TIMEOUT_SECONDS = 1800.0

# Layouts of this process's group: Megatron lets go of no group, and those of gloo have threads that wake all the time.
_made: dict[tuple[Any, ParallelConfig, torch.device], Topology] = {}


@dataclass(frozen=True)
class Topology:
    """Sizes, this rank's place in each and the process groups of one layout.

    Ranks count tensor, context, data and pipeline parallelism, the first fastest. Experts are never cut: expert
    parallelism divides them over the tensor x context x data ranks of a pipeline stage.
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
    megatron_state: dict[str, Any] = field(repr=False)  # what parallel_state holds while this layout is in force

    @property
    def num_stages(self) -> int:
        """Stages that a micro-batch passes, over all pipeline ranks."""
        return self.pipeline_size * self.virtual_size

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages of this rank, one a chunk."""
        return tuple(range(self.pipeline_rank, self.num_stages, self.pipeline_size))

    @property
    def replica_rank(self) -> int:
        """This rank's place among those that generate for themselves: data x context parallel ranks."""
        return self.data_rank * self.context_size + self.context_rank

    @property
    def num_replicas(self) -> int:
        return self.data_size * self.context_size

    @property
    def token_groups(self) -> list[dist.ProcessGroup]:
        """The groups of ranks that hold other tokens of the same layers: what is summed over tokens adds up over them.
        Without sequence parallelism each tensor-parallel rank has every row."""
        groups = [self.groups.dp_cp]
        return [*groups, self.groups.tp] if self.sequence_parallel else groups

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Put this layout in force inside the block. Megatron-Core reads its module's globals in many places, when a
        model is built and when it runs: two layouts in one process take turns. No communication."""
        before = _megatron_state()
        _set_megatron_state(self.megatron_state)
        try:
            yield
        finally:
            _set_megatron_state(before)


def collective_timeout(watchdog: WatchdogConfig) -> float:
    """Seconds that ranks wait for each other. With heartbeats twice the watchdog's own time-out: it knows who is merely
    slow and who hangs, and is to speak first."""
    return watchdog.timeout_seconds * (2 if watchdog.heartbeat_seconds else 1)


def start_process(device: torch.device, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Join torch.distributed as torchrun describes it, or alone without torchrun. A time-out turns a dead rank into
    an error on the others instead of a wait without end."""
    cpu_stand_ins.install()
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # An error or a time-out of NCCL ends the process, without waiting for communicators that may hang.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = platform.distributed_backend(device)
    if "RANK" in os.environ:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=_of_attempt(store), rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if backend == "gloo":
        atexit.register(_leave)


def _of_attempt(store: dist.Store) -> dist.Store:
    """torchrun's processes share a store that outlives them: those that it starts again must not read in it where the
    dead ones were to be reached. The torchruns of several machines do not count attempts alike; see the message."""
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


def _leave() -> None:
    """Let gloo's threads end while Python runs: one that its end cuts off aborts a process that had done its work."""
    _made.clear()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def build_topology(
    parallel: ParallelConfig, device: torch.device, seed: int, timeout_seconds: float = TIMEOUT_SECONDS
) -> Topology:
    """Make Megatron's process groups for a layout, seed its generators and put it in force. Collective over the world.

    An earlier layout of this process stays usable: its `active` puts it back, and asked for again it is that one.
    Raises UserError when the layout does not fit the number of processes.
    """
    check_layout(parallel, dist.get_world_size())
    world, layout = dist.group.WORLD, parallel.model_copy(update={"distributed_optimizer": True})
    if any(key[0] is not world for key in _made):  # the process has joined another group since
        _made.clear()
    topology = _made.get((world, layout, device)) or _make(layout, device, timeout_seconds)
    _made[world, layout, device] = topology
    _set_megatron_state(topology.megatron_state)
    with cpu_stand_ins.cpu_devices():
        tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return topology


def _make(parallel: ParallelConfig, device: torch.device, timeout_seconds: float) -> Topology:
    """A layout with groups of its own, in force."""
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
    """Raise UserError, naming what would work, for a layout that contradicts itself or does not divide the processes.
    `key`: the section of the configuration that it stands in."""
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
    return {
        name: value
        for name, value in vars(parallel_state).items()
        if name.startswith("_") and name[1:2].isupper() and not isinstance(value, ModuleType | FunctionType | type)
    }


def _set_megatron_state(state: dict[str, Any]) -> None:
    vars(parallel_state).update(state)


_NO_LAYOUT = _megatron_state()
