"""The float32 average of a teacher that follows the student, in mcore's format, which any parallel layout can load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import is_main_replica

from megatron_oprd.checkpoint.megatron_format import sharded_weights
from megatron_oprd.checkpoint.sharded_write import PlannedWrite, plan_write
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.teacher_average import TeacherAverage

FOLDER = "average"  # of a checkpoint


def plan_average(average: TeacherAverage, student: Stage, topology: Topology, folder: Path) -> PlannedWrite:
    """Plan to write the average into the empty `folder`. The values are copies in CPU memory.

    Collective over the world. Raises what mcore, torch and the disk raise.
    """
    shapes, state = sharded_weights(student, topology), {}
    for name, values in average.gathered():
        sharded = shapes[name]
        # Only one replica of a parameter is written. The others need a shape and no memory.
        kept = values.cpu() if is_main_replica(sharded.replica_id) else torch.zeros(()).expand(values.shape)
        state[name] = _with_data(sharded, kept)
    return plan_write(state, folder)


def load_average(average: TeacherAverage, student: Stage, topology: Topology, folder: Path) -> None:
    """Load the average and give it to the teacher. Collective over the world. Raises what mcore and torch raise."""
    shapes = sharded_weights(student, topology)
    wanted = {
        name: _with_data(shapes[name], torch.empty(one.part.parameter.shape))
        for name, one in average.parameters.items()
    }
    average.load(dist_checkpointing.load(wanted, str(folder)))


def _with_data(sharded: Any, data: torch.Tensor) -> Any:
    """Return a copy of mcore's ShardedTensor, or of the factory of several, with other values."""
    if hasattr(sharded, "dtype"):
        return dataclasses.replace(sharded, data=data, dtype=data.dtype)
    return dataclasses.replace(sharded, data=data)
