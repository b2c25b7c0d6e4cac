"""A folder of mcore's `torch_dist` format on its way to the disk: planned by all ranks, written by each alone.

What needs all ranks (the plan, the index) is apart from what takes long (a file a rank), so that a thread can write
while training goes on. No collective runs beside training's, and no process is forked: mcore's own writer forks one for
every file and keeps a spawned manager for the results: seconds for a tiny model, and impossible in a daemonic process
or in a script without a `__main__` guard.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper


class PlannedWrite:
    """This rank's file of a folder that all ranks write: `stage`, if wanted, then `write`, then `finish`."""

    def __init__(self, state: dict[str, Any], folder: str | Path) -> None:
        """Agree on who writes what. Collective over the world; raises CheckpointException on every rank."""
        self._ranks = _DistWrapper(None, True, 0)
        self._writer = FileSystemWriter(folder, thread_count=1, sync_files=True)
        self._planner: Any = mcore_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        self._metadata: Metadata | None = None  # on rank 0
        self._outcome: list[WriteResult] | BaseException | None = None

        def plan_own() -> SavePlan:
            coordinates = self._ranks.is_coordinator
            self._planner.set_up_planner(state, self._writer.storage_meta(), coordinates)
            self._writer.set_up_storage_writer(coordinates)
            return self._writer.prepare_local_plan(self._planner.create_local_plan())

        def plan_all(plans: list[SavePlan]) -> list[SavePlan]:
            plans, self._metadata = self._planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        plan = self._ranks.reduce_scatter("plan", plan_own, plan_all)
        self._plan = self._planner.finish_plan(plan)

    def stage(self, *, copy: bool) -> None:
        """Take what will be written out of reach of training: into CPU memory, for as long as this object lives.
        `copy=False` for a state that is in CPU memory and that nobody changes. No communication."""
        data = {}
        for item in self._plan.items:
            value = self._planner.resolve_data(item)
            if copy and isinstance(value, torch.Tensor):
                value = value.detach().to("cpu", copy=True)
            data[item.index] = value
        self._planner = _Staged(data)
        # Else the writer would open a CUDA stream, in a thread on another device.
        self._writer.per_thread_copy_ahead = 0

    def write(self) -> None:
        """Write the file and force it to the disk. No communication. Never raises: what went wrong comes out in
        `finish`."""
        try:
            self._outcome = self._writer.write_data(self._plan, self._planner).value()
        except BaseException as error:  # told to all ranks, whatever it is
            self._outcome = error

    def finish(self) -> None:
        """Write the index of what all ranks wrote. Collective over the world; raises CheckpointException on every rank
        for what went wrong on any."""

        def own_results() -> list[WriteResult]:
            if isinstance(self._outcome, BaseException):
                raise self._outcome
            assert self._outcome is not None, "finish comes after write"
            return self._outcome

        def write_index(results: list[list[WriteResult]]) -> None:
            assert self._metadata is not None  # on rank 0, where this runs
            self._writer.finish(self._metadata, results)

        self._ranks.all_reduce("write", own_results, write_index)


def plan_write(state: dict[str, Any], folder: str | Path) -> PlannedWrite:
    """Plan to write mcore's sharded state dict into the empty `folder`; what is not sharded, rank 0 writes at once.
    Collective over the world; raises what mcore, torch and the disk raise."""
    strategy = _PlanStrategy()
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy)
    assert strategy.planned is not None
    return strategy.planned


class _PlanStrategy(mcore_torch.TorchDistSaveShardedStrategy):
    """What mcore calls with the part of a state dict that is sharded."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.planned: PlannedWrite | None = None

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        grouped, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.planned = PlannedWrite(mcore_torch.mcore_to_pyt_state_dict(grouped, False), checkpoint_dir)


class _Staged:
    """In the planner's place, answers the writer from copies: the plan is made already."""

    def __init__(self, data: Mapping[MetadataIndex, Any]) -> None:
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._data[write_item.index]
