"""Frozen teachers on this rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from megatron_oprd.models.build import ModelPart, build_model
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.models.model import Stage
from megatron_oprd.models.precision import PLAIN, ModelPrecision
from megatron_oprd.models.projection import TeacherMap
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import FINAL_STATES, StateKey


class FrozenModel:
    """This rank's chunks of a frozen model, whose precision may change between two passes."""

    def __init__(self, build: Callable[[ModelPrecision], Stage], precision: ModelPrecision, *, stays: bool) -> None:
        """Build the model now if it stays in memory, otherwise anew for each pass. Collective over the world."""
        self._build, self._precision, self._stays = build, precision, stays
        self._stage = build(precision) if stays else None

    def __call__(self) -> Stage:
        """Return the chunks with their weights. Collective over the world if they have to be built."""
        if not self._stays:
            return self._build(self._precision)
        if self._stage is None:
            self._stage = self._build(self._precision)
        return self._stage

    def switch(self, precision: ModelPrecision) -> None:
        """Build the model in another precision when it is called next. Its memory is free until then."""
        self._stage, self._precision = None, precision


@dataclass(frozen=True)
class Base:
    """The frozen model that the teacher was trained from, built like the teacher."""

    load: Callable[[], Stage]
    extrapolate: float  # lambda: targets are base + lambda (teacher - base)
    layers: bool = True  # True: the hidden states are extrapolated
    output: bool = False  # True: the logits are, so that the base's final states lie beside the teacher's

    def target(self, teacher: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """Return the extrapolated states, computed in float32 at least, in the dtype of `teacher`.

        The form h_T + (lambda - 1) (h_T - h_B) gives exactly h_T if both models are equal.
        """
        wide = torch.promote_types(teacher.dtype, torch.float32)
        of_teacher = teacher.to(wide)
        return torch.add(of_teacher, of_teacher - base.to(wide), alpha=self.extrapolate - 1).to(teacher.dtype)


@dataclass(frozen=True)
class Teacher:
    """This rank's chunks of a frozen teacher, in the student's layout or in a layout of its own."""

    load: Callable[[], Stage]  # returns the chunks with their weights: always the same ones, or new ones for each pass
    topology: Topology  # the teacher's layout; the same object as the student's if both share one
    plan: LayerPlan
    row_width: int  # width of a row of targets: the hidden size of the widest teacher
    final_row_width: int | None = None  # the same for rows with the key FINAL_STATES; None: row_width
    own_prompts: bool = False  # True if a rollout may have other tokens for the teacher (own prompt or own tokenizer)
    offload: bool = False  # True if targets wait in CPU memory
    base: Base | None = None  # None: the targets are the teacher's own hidden states
    maps: Mapping[int, TeacherMap] = field(
        default_factory=dict
    )  # of a bridge, by teacher layer: targets have r columns

    def width_of_rows(self, key: StateKey) -> int:
        """Return the width of a row of targets: that of the teacher with the widest rows."""
        return self.final_row_width if key == FINAL_STATES and self.final_row_width is not None else self.row_width

    def shares_micro_batches(self, student_topology: Topology) -> bool:
        """Return True if the teacher can run on the student's own micro-batches, provided it is the only teacher."""
        return self.topology is student_topology and not self.own_prompts

    def targets_are_local(self, student_topology: Topology) -> bool:
        """Return True if no hidden state has to be sent between ranks, provided it is the only teacher."""
        rows_are_cut = student_topology.context_size > 1 or student_topology.sequence_parallel
        stays = self.plan.aligned and not self.plan.flow_straddles
        return stays and self.topology is student_topology and not (self.own_prompts and rows_are_cut)

    def can_stream(self, student_topology: Topology) -> bool:
        """Return True if the targets of a micro-batch can be computed when the student starts that micro-batch.

        With several pipeline stages, the teacher's activations would have to travel beside the student's, and mcore's
        schedule has no place for them.
        """
        return self.targets_are_local(student_topology) and self.topology.pipeline_size == 1


def switch_precision(teacher: Teacher, precision: ModelPrecision) -> None:
    """Build a teacher, and the base from which its states are extrapolated, in another precision for the next pass."""
    for load in (teacher.load, teacher.base.load if teacher.base is not None else None):
        if isinstance(load, FrozenModel):
            load.switch(precision)


def build_frozen(
    teacher: PlannedTeacher, topology: Topology, dtype: torch.dtype, precision: ModelPrecision = PLAIN
) -> Stage:
    """Build this rank's chunks of a teacher up to its highest compared layer, without LM head and without weights.

    Gradients are off while the model is built: otherwise Transformer Engine makes a second, transposed copy of FP8
    weights. Collective over the world.
    """
    with topology.active(), torch.no_grad():
        return build_model(
            teacher.spec,
            topology,
            dtype,
            ModelPart(teacher.plan.teacher_stages, lm_head=False, final_norm=teacher.plan.teacher_final_norm),
            precision=precision,
        )
