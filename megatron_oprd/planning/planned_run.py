"""The run that a dry run describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_oprd.config import Config
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.types import ModelSpec


@dataclass(frozen=True)
class PlannedRun:
    """The configuration and the models of a run, and the sizes on which its memory and time depend."""

    config: Config
    student: ModelSpec
    teachers: Mapping[str, PlannedTeacher]  # by data_source; the name of a single teacher is ""
    lengths: Lengths  # the most tokens of a sequence and of a response
    world_size: int
    bridge_rank: int | None = None  # rank r of the bridge; None without a bridge

    @property
    def layer_plan(self) -> LayerPlan:
        """Return the layer plan of the first teacher. All teachers are compared at the same student layers."""
        return next(iter(self.teachers.values())).plan

    @property
    def rollouts_per_step(self) -> int:
        """Return the number of rollouts of a step, over all ranks."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt
