"""The optimizer's state on disk, in mcore's format that any layout reads.

mcore writes and reads it for the fused optimizers of CUDA and for models whose buffers have one bucket. What torch's
AdamW (without Transformer Engine and apex) and a tied embedding need on top is all here.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer import DistributedOptimizer

from megatron_oprd.checkpoint.megatron_format import sharded_weights
from megatron_oprd.checkpoint.sharded_write import PlannedWrite, plan_write
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import platform
from megatron_oprd.training.student import Student


def plan_optimizer(student: Student, topology: Topology, folder: Path) -> PlannedWrite:
    """Plan to write the state of all ranks into the empty `folder`. Collective over the world; raises what mcore, torch
    and the disk raise."""
    with platform.cpu_devices():
        state = _sharded_state(student, topology, is_loading=False)
        chained = len(student.optimizer.chained_optimizers) > 1
        for one in state["optimizer"].values() if chained else [state["optimizer"]]:
            if one.get("param_state") == {}:  # mcore would warn that not all ranks have the same nothing
                del one["param_state"]
            for group in one.get("optimizer", one)["param_groups"]:  # an offloaded state names classes: no plain data
                for key in [key for key, value in group.items() if isinstance(value, type)]:
                    del group[key]
        return plan_write(state, folder)


def state_is_a_copy(student: Student) -> bool:
    """Whether what `plan_optimizer` writes is in CPU memory and the optimizer's no more: a distributed optimizer's is
    gathered there."""
    return all(isinstance(one, DistributedOptimizer) for one in student.optimizer.chained_optimizers)


def load_optimizer(student: Student, topology: Topology, folder: Path) -> None:
    """Put the optimizer where a checkpoint left it, in this layout. Collective over the world; raises what mcore
    and torch raise for damaged files."""
    with platform.cpu_devices():
        _make_loadable(student)
        wanted = _sharded_state(student, topology, is_loading=True)
        student.optimizer.load_state_dict(dist_checkpointing.load(wanted, str(folder))["optimizer"])
        _separate_steps(student)


def _sharded_state(student: Student, topology: Topology, *, is_loading: bool) -> dict[str, Any]:
    metadata = {
        "non_homogeneous_layers": True,
        "dp_cp_group": topology.groups.dp_cp,
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    for optimizer in student.optimizer.chained_optimizers:
        if isinstance(optimizer, DistributedOptimizer):
            optimizer.get_parameter_state_dp_zero = partial(_state_of_buffers, optimizer)
            trains = any(group["params"] for group in optimizer.optimizer.param_groups)
            if isinstance(optimizer.optimizer, torch.optim.AdamW) and not trains:
                optimizer.state_dict = partial(_groups, optimizer, step=float(student.scheduler.num_steps))
    weights = sharded_weights(student.stage, topology)
    return {"optimizer": student.optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)}


def _groups(optimizer: DistributedOptimizer, *, step: float) -> dict[str, Any]:
    """The parameter groups of a rank that has nothing to train: a pipeline stage above the highest compared layer.
    mcore would read the step off a parameter's state."""
    groups = optimizer.optimizer.state_dict()["param_groups"]
    named = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return {"optimizer": {"param_groups": [{**group, "step": step} for group in named]}}


def _state_of_buffers(optimizer: DistributedOptimizer, **options: Any) -> dict[Any, Any]:
    """mcore joins a buffer's buckets without the padding between them and cuts at places that count it. Only a tied
    embedding has a bucket beside others; on the last pipeline stage it comes first and would shift all the rest."""
    state: dict[Any, Any] = DistributedOptimizer.get_parameter_state_dp_zero(optimizer, **options)
    for number, buffer in enumerate(optimizer.buffers):
        sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
        padding = [bucket.grad_data.numel() - size for bucket, size in zip(buffer.buckets, sizes, strict=True)]
        for tensors in state[number].values():
            for name in ("param", "exp_avg", "exp_avg_sq"):
                if len(sizes) > 1 and len(tensors[name]) == sum(sizes):
                    parts = zip(tensors[name].split(sizes), padding, strict=True)
                    tensors[name] = torch.cat([torch.nn.functional.pad(part, (0, pad)) for part, pad in parts])
    return state


def _make_loadable(student: Student) -> None:
    """Prepare torch's optimizers for mcore's loading, which is written for the fused ones of CUDA."""
    for optimizer in student.optimizer.chained_optimizers:
        optimizer.init_state_fn = optimizer.init_state_fn or (lambda *args: None)  # SGD keeps no state
        if not isinstance(optimizer.optimizer, torch.optim.AdamW):
            continue
        # AdamW has no state before its first step, and mcore loads only into state that is there.
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.optimizer.state[parameter] = {
                    "step": torch.zeros(()),
                    "exp_avg": torch.zeros_like(parameter, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32),
                }
        if isinstance(optimizer, DistributedOptimizer):
            optimizer._set_main_param_and_optimizer_states = partial(_set_states, optimizer)


def _separate_steps(student: Student) -> None:
    """mcore gives every parameter's AdamW state one `step` tensor, which would then count once for each of them."""
    for optimizer in student.optimizer.chained_optimizers:
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            for state in optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()


def _set_states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    """mcore's method looks for a `step` among the loaded tensors; it was loaded with the parameter groups."""
    step = optimizer._get_main_param_and_optimizer_states(parameter)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, parameter, {**tensors, "step": step})
