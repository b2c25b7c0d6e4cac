"""Saving and loading of the optimizer's state, in mcore's format, which any parallel layout can load.

`saver.py` calls `plan_optimizer`, `training_state.py` calls `load_optimizer`. mcore itself handles fused CUDA
optimizers and models with one bucket a buffer. This file adds what torch's AdamW (used without Transformer Engine and
apex) and tied embeddings need.
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
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.student import Student


def plan_optimizer(student: Student, topology: Topology, folder: Path) -> PlannedWrite:
    """Plan to write the state of all ranks into the empty `folder`.

    Collective over the world. Raises what mcore, torch and the disk raise.
    """
    with cpu_stand_ins.cpu_devices():
        state = _sharded_state(student, topology, is_loading=False)
        chained = len(student.optimizer.chained_optimizers) > 1
        for single in state["optimizer"].values() if chained else [state["optimizer"]]:
            if single.get("param_state") == {}:  # mcore would warn that the empty dicts of the ranks differ
                del single["param_state"]
            # The groups of an offloaded optimizer contain classes, which the file format does not allow.
            for group in single.get("optimizer", single)["param_groups"]:
                for key in [key for key, value in group.items() if isinstance(value, type)]:
                    del group[key]
        return plan_write(state, folder)


def state_is_a_copy(student: Student) -> bool:
    """Return True if the tensors that `plan_optimizer` writes are copies in CPU memory.

    mcore gathers the state of a distributed optimizer in CPU memory before it writes.
    """
    return all(isinstance(single, DistributedOptimizer) for single in student.optimizer.chained_optimizers)


def load_optimizer(student: Student, topology: Topology, folder: Path) -> None:
    """Load the optimizer's state in the student's layout. AdamW's betas and epsilon stay those of the configuration.

    Collective over the world. Raises what mcore and torch raise for damaged files.
    """
    with cpu_stand_ins.cpu_devices():
        _make_loadable(student)
        configured = [{key: group[key] for key in ("betas", "eps") if key in group} for group in _param_groups(student)]
        wanted = _sharded_state(student, topology, is_loading=True)
        student.optimizer.load_state_dict(dist_checkpointing.load(wanted, str(folder))["optimizer"])
        _separate_steps(student)
        for group, values in zip(_param_groups(student), configured, strict=True):
            group.update(values)


def _param_groups(student: Student) -> list[dict[str, Any]]:
    return [group for single in student.optimizer.chained_optimizers for group in single.optimizer.param_groups]


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
    """Return the optimizer state of a rank that trains nothing: a pipeline stage above the highest compared layer.

    mcore would take the step from the state of a parameter.
    """
    groups = optimizer.optimizer.state_dict()["param_groups"]
    named = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return {"optimizer": {"param_groups": [{**group, "step": step} for group in named]}}


def _state_of_buffers(optimizer: DistributedOptimizer, **options: Any) -> dict[Any, Any]:
    """Return mcore's state of each buffer, with the padding between the buckets put back.

    mcore joins the buckets of a buffer without their padding, but splits them at offsets that count the padding. Only a
    tied embedding makes several buckets. On the last pipeline stage its bucket is the first and would shift the others.
    """
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
    """Prepare torch's optimizers for mcore's loading code, which is written for fused CUDA optimizers."""
    for optimizer in student.optimizer.chained_optimizers:
        optimizer.init_state_fn = optimizer.init_state_fn or (lambda *args: None)  # SGD has no state
        if not isinstance(optimizer.optimizer, torch.optim.AdamW):
            continue
        # AdamW has no state before its first step, and mcore loads into existing state only.
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
    """Give each parameter its own `step` tensor: mcore shares one, which each parameter would then increment."""
    for optimizer in student.optimizer.chained_optimizers:
        if isinstance(optimizer.optimizer, torch.optim.AdamW):
            for state in optimizer.optimizer.state.values():
                state["step"] = state["step"].clone()


def _set_states(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    """Add the `step` that mcore's method expects among the loaded tensors: it was loaded with the parameter groups."""
    step = optimizer._get_main_param_and_optimizer_states(parameter)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(optimizer, parameter, {**tensors, "step": step})
