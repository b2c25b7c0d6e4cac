"""Writing of a folder in mcore's `torch_dist` format: planned by all ranks, then written by each rank alone.

`megatron_format.py` and `optimizer_state.py` plan writes; `saver.py` runs them. The steps that need all ranks (the
plan, the index) are separate from the slow one (one file a rank), so that a thread can write while training continues.
The thread runs no collective beside those of training.

No process is forked. mcore's own writer forks one process a file and starts a manager for the results. That takes
seconds for a tiny model, and fails in a daemonic process and in a script without a `__main__` guard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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

from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import commit_partial, discard_partial, explain_os_errors, prepare_partial


class PlannedWrite:
    """This rank's part of a folder that all ranks write. Call `snapshot` (optional), then `write`, then `finish`."""

    def __init__(self, state: dict[str, Any], folder: str | Path) -> None:
        """Agree on which rank writes what. Collective over the world; raises CheckpointException on every rank."""
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

    def snapshot(self, *, copy: bool) -> None:
        """Keep the values to write in CPU memory, so that training may change the originals. No communication.

        `copy=False` is for values that are in CPU memory already and that nothing changes.
        """
        data = {}
        for item in self._plan.items:
            value = self._planner.resolve_data(item)
            if copy and isinstance(value, torch.Tensor):
                value = value.detach().to("cpu", copy=True)
            data[item.index] = value
        self._planner = _Snapshot(data)
        # Otherwise the writer would open a CUDA stream, in a thread whose current device is another one.
        self._writer.per_thread_copy_ahead = 0

    def write(self) -> None:
        """Write this rank's file and force it to the disk. No communication. `finish` raises an error of the write."""
        try:
            self._outcome = self._writer.write_data(self._plan, self._planner).value()
        except BaseException as error:  # `finish` sends every error to all ranks
            self._outcome = error

    def finish(self) -> None:
        """Write the index of the files of all ranks.

        Collective over the world. Raises CheckpointException on every rank for an error of any rank.
        """

        def own_results() -> list[WriteResult]:
            if isinstance(self._outcome, BaseException):
                raise self._outcome
            assert self._outcome is not None, "call write before finish"
            return self._outcome

        def write_index(results: list[list[WriteResult]]) -> None:
            assert self._metadata is not None  # this function runs on rank 0
            self._writer.finish(self._metadata, results)

        self._ranks.all_reduce("write", own_results, write_index)


def plan_write(
    state: dict[str, Any], folder: str | Path, content_metadata: dict[str, Any] | None = None
) -> PlannedWrite:
    """Plan to write mcore's sharded state dict into the empty `folder`. Rank 0 writes the unsharded values at once.

    `content_metadata` is what mcore's `load_content_metadata` returns for the folder. Collective over the world. Raises
    what mcore, torch and the disk raise.
    """
    strategy = _PlanStrategy()
    dist_checkpointing.save(state, str(folder), sharded_strategy=strategy, content_metadata=content_metadata)
    assert strategy.planned is not None
    return strategy.planned


class _PlanStrategy(mcore_torch.TorchDistSaveShardedStrategy):
    """A save strategy of mcore that only plans the write of the sharded values."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.planned: PlannedWrite | None = None

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str | Path) -> None:
        grouped, _, _ = mcore_torch._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        self.planned = PlannedWrite(mcore_torch.mcore_to_pyt_state_dict(grouped, False), checkpoint_dir)


class _Snapshot:
    """Replaces the planner during the write and returns the copied values."""

    def __init__(self, data: Mapping[MetadataIndex, Any]) -> None:
        self._data = data

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._data[write_item.index]


def write_new_folder(
    folder: str | Path,
    topology: Topology,
    plan: Callable[[Path], PlannedWrite],
    describe: Callable[[Path], None],
) -> None:
    """Write a folder that appears when it is complete, or not at all.

    Collective over the world. Raises UserError on every rank for a folder that is not empty and for a disk error.

    Args:
        plan: plans the write of the weights into the folder it is given, on every rank.
        describe: writes the other files to that folder, on rank 0.
    """
    partial = on_rank_zero(lambda: prepare_partial(folder))
    try:
        with explain_os_errors(partial):
            weights = plan(partial)
            weights.write()
            weights.finish()

        def commit() -> None:
            describe(partial)
            commit_partial(folder)

        on_rank_zero(commit)
    except BaseException:
        if topology.rank == 0:
            discard_partial(folder)
        raise
