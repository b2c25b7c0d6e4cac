"""Where the compared layers live: which pipeline stage runs which blocks of student and teacher."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from megatron_oprd.config import RepresentationConfig
from megatron_oprd.models.layer_pairs import layer_pairs
from megatron_oprd.types import LayerPair, ModelSpec, UserError


@dataclass(frozen=True)
class LayerPlan:
    """Pairs of layers and the blocks of each pipeline stage. Both models are cut so that the two layers of a pair live
    on one stage: a teacher in the student's layout then sends nothing."""

    pairs: tuple[LayerPair, ...]
    student_depth: int  # blocks of the whole student
    teacher_depth: int  # blocks of the whole teacher, of which only the lowest sum(teacher_stages) are built
    final_norm: bool  # whether layer L is read after the final norm
    student_stages: tuple[int, ...]  # blocks on each pipeline stage
    teacher_stages: tuple[int, ...]

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(pair.student for pair in self.pairs)

    @property
    def teacher_of(self) -> dict[int, int]:
        return {pair.student: pair.teacher for pair in self.pairs}

    @property
    def student_last_layer(self) -> int:
        """Blocks above it do not run in training and are not trained."""
        return max(self.student_layers)

    @property
    def student_normed_layer(self) -> int | None:
        """L of the student when it is compared after the final norm."""
        return self.student_depth if self.final_norm and self.student_last_layer == self.student_depth else None

    @property
    def teacher_normed_layer(self) -> int | None:
        return self.teacher_depth if self.final_norm and sum(self.teacher_stages) == self.teacher_depth else None

    def student_stage(self, layer: int) -> int:
        """The pipeline stage that owns a student layer. L after the final norm lives on the last one."""
        return _owner(layer, self.student_stages, self.student_normed_layer)

    def as_json(self) -> dict[str, object]:
        pairs = [
            {"student": pair.student, "teacher": pair.teacher, "stage": self.student_stage(pair.student)}
            for pair in self.pairs
        ]
        return {
            "pairs": pairs,
            "final_norm": self.final_norm,
            "student_layers_per_stage": list(self.student_stages),
            "teacher_layers_per_stage": list(self.teacher_stages),
            "teacher_layers_built": sum(self.teacher_stages),
            "teacher_layers_total": self.teacher_depth,
        }


def even_stages(num_layers: int, pipeline_size: int) -> tuple[int, ...]:
    """Blocks per pipeline stage, as even as they go, the earlier stages holding one more. Raises UserError for more
    stages than layers."""
    if pipeline_size > num_layers:
        raise UserError(
            f"parallel.pipeline={pipeline_size} has more stages than the model's {num_layers} layers; "
            f"use at most {num_layers}"
        )
    share, more = divmod(num_layers, pipeline_size)
    return tuple(share + (stage < more) for stage in range(pipeline_size))


def make_plan(
    config: RepresentationConfig, student: ModelSpec, teacher: ModelSpec, pipeline_size: int = 1
) -> LayerPlan:
    """The plan of a run. Raises UserError for layers that do not exist, for unequal widths (OPRD-Vanilla compares the
    states themselves) and for pairs that no cut of the teacher puts on one stage."""
    if student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"student hidden_size {student.hidden_size} differs from teacher hidden_size {teacher.hidden_size}: hidden "
            "states of another width cannot be compared directly; use a teacher of the student's width"
        )
    pairs = layer_pairs(config.layers, config.pairs, student.num_layers, teacher.num_layers)
    student_stages = even_stages(student.num_layers, pipeline_size)
    student_reaches_norm = config.final_norm and pairs[-1].student == student.num_layers
    teacher_stages = _align(pairs, student_stages, student.num_layers if student_reaches_norm else None)
    plan = LayerPlan(pairs, student.num_layers, teacher.num_layers, config.final_norm, student_stages, teacher_stages)
    for pair in pairs:
        stage = plan.student_stage(pair.student)
        teacher_stage = _owner(pair.teacher, teacher_stages, plan.teacher_normed_layer)
        if stage != teacher_stage:
            raise UserError(
                f"loss.representation: parallel.pipeline={pipeline_size} puts student layer {pair.student} on stage "
                f"{stage} and teacher layer {pair.teacher} on stage {teacher_stage}; use pairs that ascend together "
                "or parallel.pipeline=1"
            )
    return plan


def _align(pairs: tuple[LayerPair, ...], student_stages: tuple[int, ...], normed_layer: int | None) -> tuple[int, ...]:
    """Teacher blocks per stage: each stage reaches up to the highest teacher layer that it or an earlier one needs."""
    needed = [0] * len(student_stages)
    for pair in pairs:
        stage = _owner(pair.student, student_stages, normed_layer)
        needed[stage] = max(needed[stage], pair.teacher)
    reached = list(itertools.accumulate(needed, max))
    return tuple(high - low for low, high in itertools.pairwise([0, *reached]))


def _owner(layer: int, stages: tuple[int, ...], normed_layer: int | None) -> int:
    if layer == normed_layer:
        return len(stages) - 1
    return next(stage for stage, end in enumerate(itertools.accumulate(stages)) if layer <= end)
