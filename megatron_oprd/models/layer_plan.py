"""Where the compared layers live: which stage runs which blocks of student and teacher."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.config import MAKE_A_BRIDGE, LossConfig, ParallelConfig, TeacherConfig
from megatron_oprd.models.layer_pairs import layer_pairs
from megatron_oprd.types import FINAL_STATES, LayerPair, ModelSpec, StateKey, UserError


@dataclass(frozen=True)
class LayerPlan:
    """Pairs of layers and the blocks of each stage of both models.

    `aligned`: the teacher runs in the student's layout and is cut so that the two layers of a pair live on one rank;
    its states are then born where they are read. Otherwise they travel (`parallel/reshard.py`). `output`: the
    next-token distributions of both models are compared, from their hidden states with the key FINAL_STATES.
    """

    pairs: tuple[LayerPair, ...]
    student_depth: int  # blocks of the whole student
    teacher_depth: int  # blocks of the whole teacher, of which only the lowest sum(teacher_stages) are built
    final_norm: bool  # whether layer L is read after the final norm
    student_stages: tuple[int, ...]  # blocks on each stage; stage s is chunk s // pipeline_size of its pipeline rank
    teacher_stages: tuple[int, ...]
    pipeline_size: int = 1  # of the student
    aligned: bool = True
    output: bool = False

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(pair.student for pair in self.pairs)

    @property
    def student_last_layer(self) -> int:
        """Blocks above it do not run in training and are not trained."""
        return self.student_depth if self.output else max(self.student_layers)

    @property
    def student_normed_layer(self) -> int | None:
        """L of the student when it is compared after the final norm."""
        return self.student_depth if self.final_norm and self.student_depth in self.student_layers else None

    @property
    def teacher_normed_layer(self) -> int | None:
        return self.teacher_depth if self.final_norm and sum(self.teacher_stages) == self.teacher_depth else None

    @property
    def student_final_norm(self) -> bool:
        """Whether the student's final norm runs."""
        return self.output or self.student_normed_layer is not None

    @property
    def teacher_final_norm(self) -> bool:
        """Whether the teacher needs its final norm."""
        return self.output or self.teacher_normed_layer is not None

    def student_stage(self, layer: StateKey) -> int:
        """The stage that owns a student layer. L after the final norm lives on the last one."""
        return _owner(layer, self.student_stages, self.student_normed_layer)

    def teacher_stage(self, layer: StateKey) -> int:
        """The stage that owns a teacher layer, in the teacher's layout."""
        return _owner(layer, self.teacher_stages, self.teacher_normed_layer)

    def readers(self, stages: Sequence[int]) -> dict[StateKey, StateKey]:
        """{student layer: teacher layer} of what is compared on one of the student's `stages`."""
        pairs: dict[StateKey, StateKey] = {pair.student: pair.teacher for pair in self.pairs}
        if self.output:
            pairs[FINAL_STATES] = FINAL_STATES
        return {layer: teacher for layer, teacher in pairs.items() if self.student_stage(layer) in stages}

    def teacher_layers(self, stages: Sequence[int]) -> tuple[StateKey, ...]:
        """Return the keys of the compared states that the teacher's `stages` compute: layers ascending, then
        FINAL_STATES."""
        keys: list[StateKey] = [*sorted({pair.teacher for pair in self.pairs})]
        keys += [FINAL_STATES] if self.output else []
        return tuple(key for key in keys if self.teacher_stage(key) in stages)

    def student_place(self, layer: int) -> tuple[int, int]:
        """(chunk, pipeline rank) that owns a student layer."""
        return divmod(self.student_stage(layer), self.pipeline_size)

    def as_json(self) -> dict[str, object]:
        pairs = []
        for pair in self.pairs:
            chunk, rank = self.student_place(pair.student)
            pairs.append({"student": pair.student, "teacher": pair.teacher, "stage": rank, "chunk": chunk})
        return {
            "pairs": pairs,
            "aligned": self.aligned,
            "output": self.output,
            "final_norm": self.final_norm,
            "student_layers_per_stage": list(self.student_stages),  # chunk by chunk under virtual pipelining
            "teacher_layers_per_stage": list(self.teacher_stages),
            "teacher_layers_built": sum(self.teacher_stages),
            "teacher_layers_total": self.teacher_depth,
        }


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher of the configuration, its layout where it has one of its own, and the layers compared with it."""

    config: TeacherConfig
    spec: ModelSpec
    layout: ParallelConfig | None
    plan: LayerPlan


def even_stages(num_layers: int, pipeline_size: int, virtual_size: int = 1, key: str = "parallel") -> tuple[int, ...]:
    """Blocks per stage, as even as they go, the earlier stages holding one more. Raises UserError for more stages than
    layers; `key`: the section of the configuration that the sizes stand in."""
    stages = pipeline_size * virtual_size
    if stages > num_layers:
        virtual = f" x {key}.virtual_pipeline={virtual_size}" if virtual_size > 1 else ""
        most = num_layers // virtual_size
        works = f"use {key}.pipeline of at most {most}"
        if virtual_size > 1 and most < 2:  # virtual stages need two real ones
            works = f"use {key}.virtual_pipeline=null and {key}.pipeline of at most {num_layers}"
        raise UserError(
            f"{key}.pipeline={pipeline_size}{virtual} has more stages than the model's {num_layers} layers; {works}"
        )
    return _evenly(num_layers, stages)


def _evenly(blocks: int, stages: int) -> tuple[int, ...]:
    share, more = divmod(blocks, stages)
    return tuple(share + (stage < more) for stage in range(stages))


def make_plan(
    loss: LossConfig,
    student: ModelSpec,
    teacher: ModelSpec,
    pipeline_size: int = 1,
    virtual_size: int = 1,
    teacher_pipeline: int | None = None,
    section: str = "teacher",
) -> LayerPlan:
    """The plan of a run. `teacher_pipeline`: pipeline stages of a teacher in a layout of its own; None: the student's.
    `section`: where the teacher stands in the configuration.

    Raises UserError for layers that do not exist, for more stages than layers and, where hidden states are compared
    without a bridge (OPRD-Vanilla), for unequal widths.
    """
    config = loss.representation
    if loss.reads_layers and config.bridge is None and student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"student hidden_size {student.hidden_size} differs from {section} hidden_size {teacher.hidden_size}: "
            f"hidden states of another width cannot be compared directly; {MAKE_A_BRIDGE} and name it in "
            "loss.representation.bridge, use a teacher of the student's width, or an output-space objective alone "
            "(loss.representation.weight=0)"
        )
    try:
        depths = student.num_layers, teacher.num_layers
        pairs = layer_pairs(*depths, config.layers, config.pairs) if loss.reads_layers else ()
    except UserError as error:
        raise UserError(str(error) if section == "teacher" else f"with {section}: {error}") from None
    student_stages = even_stages(student.num_layers, pipeline_size, virtual_size)
    plan = LayerPlan(
        pairs,
        student.num_layers,
        teacher.num_layers,
        config.final_norm,
        student_stages,
        (),
        pipeline_size,
        output=loss.reads_output,
    )
    highest = teacher.num_layers if plan.output else max(pair.teacher for pair in pairs)
    if teacher_pipeline is None:
        plan = dataclasses.replace(plan, teacher_stages=_align(plan))
        if all(plan.student_stage(pair.student) == plan.teacher_stage(pair.teacher) for pair in pairs):
            return plan
    else:
        even_stages(teacher.num_layers, teacher_pipeline, key=f"{section}.parallel")
    # Cut evenly up to the highest compared layer; a stage may be left without a block.
    stages = _evenly(highest, teacher_pipeline or len(student_stages))
    return dataclasses.replace(plan, teacher_stages=stages, aligned=False)


def _align(plan: LayerPlan) -> tuple[int, ...]:
    """Teacher blocks per stage: each stage reaches up to the highest teacher layer that it or an earlier one needs."""
    needed = [0] * len(plan.student_stages)
    for pair in plan.pairs:
        stage = plan.student_stage(pair.student)
        needed[stage] = max(needed[stage], pair.teacher)
    if plan.output:
        needed[-1] = plan.teacher_depth
    reached = list(itertools.accumulate(needed, max))
    return tuple(high - low for low, high in itertools.pairwise([0, *reached]))


def _owner(layer: StateKey, stages: tuple[int, ...], normed_layer: int | None) -> int:
    if layer in (normed_layer, FINAL_STATES):
        return len(stages) - 1
    return next(stage for stage, end in enumerate(itertools.accumulate(stages)) if layer <= end)
