"""The layer plan: the pairs of layers to compare, and the layers on each pipeline stage of student and teacher."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.config import MAKE_A_BRIDGE, FlowConfig, LossConfig, ParallelConfig, TeacherConfig
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_pairs import layer_pairs
from megatron_oprd.types import FINAL_STATES, FlowKey, LayerPair, StateKey, UserError


@dataclass(frozen=True)
class FlowRole:
    """The parts of the hidden-flow loss that a rank computes at a student layer."""

    own: bool  # direction and geometry of the layer itself; False at the input of a stage, which another stage computes
    below: bool  # the pair with the layer below: value, and gradient of this layer
    above: bool  # the gradient, of this layer, of the pair with the layer above on the same stage


@dataclass(frozen=True)
class LayerPlan:
    """The compared layers of a student and one teacher, and the layers on each pipeline stage of both models.

    A stage is one model chunk: stage s is chunk s // pipeline_size on pipeline rank s % pipeline_size.
    """

    pairs: tuple[LayerPair, ...]
    student_depth: int  # number of layers of the student
    teacher_depth: int  # number of layers of the teacher; only the lowest sum(teacher_stages) are built
    final_norm: bool  # True: layer L is compared after the final norm
    student_stages: tuple[int, ...]  # number of layers on each stage
    teacher_stages: tuple[int, ...]
    pipeline_size: int = 1  # pipeline ranks of the student
    # True: the teacher has the student's layout, and both layers of each pair are on the same stage, so that no hidden
    # states have to be sent. False: parallel/reshard.py sends them.
    aligned: bool = True
    output: bool = False  # True: the next-token distributions are compared, from the states with the key FINAL_STATES
    flow: tuple[LayerPair, ...] = ()  # the layers that the loss on hidden flow compares
    flow_neighbours: bool = False  # True: it also compares each of these layers with the next one

    @property
    def student_layers(self) -> tuple[int, ...]:
        return tuple(pair.student for pair in self.pairs)

    @property
    def student_last_layer(self) -> int:
        """The highest student layer that training runs and trains."""
        return self.student_depth if self.output else max(pair.student for pair in self.tapped)

    @property
    def tapped(self) -> tuple[LayerPair, ...]:
        """The pairs of layers of all losses on layers."""
        return (*self.pairs, *self.flow)

    @property
    def student_normed_layer(self) -> int | None:
        """L if layer L of the student is compared after the final norm, else None."""
        layers = {pair.student for pair in self.tapped}
        return self.student_depth if self.final_norm and self.student_depth in layers else None

    @property
    def teacher_normed_layer(self) -> int | None:
        """L if the teacher is built up to layer L and tapped after the final norm, else None."""
        return self.teacher_depth if self.final_norm and sum(self.teacher_stages) == self.teacher_depth else None

    @property
    def student_final_norm(self) -> bool:
        """True if training runs the student's final norm."""
        return self.output or self.student_normed_layer is not None

    @property
    def teacher_final_norm(self) -> bool:
        """True if the teacher is built with its final norm."""
        return self.output or self.teacher_normed_layer is not None

    @property
    def teacher_last_layer(self) -> int:
        """The highest teacher layer that is compared, and so the highest that has to run."""
        return self.teacher_depth if self.output else max(pair.teacher for pair in self.tapped)

    def for_loss(self, loss: LossConfig) -> LayerPlan:
        """Return the plan of a step whose loss lacks a term that the run has; stages stay as they are built."""
        return dataclasses.replace(
            self,
            pairs=self.pairs if loss.reads_layers else (),
            output=self.output and loss.reads_output,
            flow=self.flow if loss.reads_flow else (),
        )

    def flow_roles(self, stages: Sequence[int]) -> dict[int, FlowRole]:
        """Return the parts of the hidden-flow loss that the rank with these stages computes, by student layer.

        A pair of neighbours on two stages belongs to the later one, which taps its input for it.
        """
        stage_of = {pair.student: self.student_stage(pair.student) for pair in self.flow}
        roles = {}
        for layer, stage in stage_of.items():
            has_next = layer + 1 in self.flow_pairs
            if stage in stages:
                above = has_next and stage_of[layer + 1] == stage
                roles[layer] = FlowRole(own=True, below=layer in self.flow_pairs, above=above)
            elif has_next and stage_of[layer + 1] in stages:
                roles[layer] = FlowRole(own=False, below=False, above=True)
        return roles

    @property
    def flow_pairs(self) -> frozenset[int]:
        """The upper layer of each pair of neighbours that the loss on hidden flow compares."""
        layers = {pair.student for pair in self.flow}
        return frozenset(layer for layer in layers if layer - 1 in layers) if self.flow_neighbours else frozenset()

    @property
    def flow_straddles(self) -> bool:
        """True if two such neighbours are on different stages, so that two stages need one layer of the teacher."""
        return any(self.student_stage(layer) != self.student_stage(layer - 1) for layer in self.flow_pairs)

    @property
    def shares_stages(self) -> bool:
        """True if both layers of each pair are on the same stage."""
        return all(self.student_stage(pair.student) == self.teacher_stage(pair.teacher) for pair in self.tapped)

    def along_student(self) -> LayerPlan:
        """Return the plan with the student's layers on each stage of the teacher, up to the highest compared one.

        The two models have the same depth, and each parameter of the teacher is on the ranks of the student's.
        """
        reached = itertools.accumulate(self.student_stages)
        ends = [min(end, self.teacher_last_layer) for end in reached]
        plan = dataclasses.replace(
            self, teacher_stages=tuple(high - low for low, high in itertools.pairwise([0, *ends]))
        )
        return dataclasses.replace(plan, aligned=plan.shares_stages)

    def student_stage(self, layer: StateKey) -> int:
        """Return the stage that computes a student layer; layer L after the final norm is on the last stage."""
        return _owner(layer, self.student_stages, self.student_normed_layer)

    def teacher_stage(self, layer: StateKey) -> int:
        """Return the stage, in the teacher's layout, that computes a teacher layer."""
        plain = layer.layer if isinstance(layer, FlowKey) else layer
        return _owner(plain, self.teacher_stages, self.teacher_normed_layer)

    def readers(self, stages: Sequence[int]) -> dict[StateKey, StateKey]:
        """Return {student key: teacher key} for the states that the losses on `stages` compare."""
        pairs: dict[StateKey, StateKey] = {pair.student: pair.teacher for pair in self.pairs}
        if self.output:
            pairs[FINAL_STATES] = FINAL_STATES
        on_stages = {layer: teacher for layer, teacher in pairs.items() if self.student_stage(layer) in stages}
        teachers = {pair.student: pair.teacher for pair in self.flow}
        return on_stages | {FlowKey(layer): FlowKey(teachers[layer]) for layer in self.flow_roles(stages)}

    def teacher_layers(self, stages: Sequence[int]) -> tuple[StateKey, ...]:
        """Return the keys of the compared states that the teacher's `stages` compute: layers ascending, FINAL_STATES,
        then the layers of the hidden-flow loss."""
        keys: list[StateKey] = [*sorted({pair.teacher for pair in self.pairs})]
        keys += [FINAL_STATES] if self.output else []
        keys += [FlowKey(layer) for layer in sorted({pair.teacher for pair in self.flow})]
        return tuple(key for key in keys if self.teacher_stage(key) in stages)

    def student_place(self, layer: int) -> tuple[int, int]:
        """Return (chunk, pipeline rank) of a student layer."""
        return divmod(self.student_stage(layer), self.pipeline_size)

    def as_json(self) -> dict[str, object]:
        """Return the content of plan.json."""
        pairs = []
        for pair in self.pairs:
            chunk, rank = self.student_place(pair.student)
            pairs.append({"student": pair.student, "teacher": pair.teacher, "stage": rank, "chunk": chunk})
        flow = {"flow": [[pair.student, pair.teacher] for pair in self.flow]} if self.flow else {}
        return {
            "pairs": pairs,
            **flow,
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
    """A teacher of the configuration with its layout and layer plan."""

    config: TeacherConfig
    spec: ModelSpec
    layout: ParallelConfig | None  # None: the student's layout
    plan: LayerPlan

    @property
    def folders(self) -> list[str]:
        """Return the folders of the teacher and of the base that its hidden states are extrapolated from."""
        base = self.config.base
        return [self.config.path] if base is None or not self.config.extrapolates else [self.config.path, base.path]


def even_stages(num_layers: int, pipeline_size: int, virtual_size: int = 1, key: str = "parallel") -> tuple[int, ...]:
    """Return the number of layers on each stage. The counts differ by at most one; earlier stages have more.

    Args:
        key: the configuration section that errors name.

    Raises:
        UserError: there are more stages than layers.
    """
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


def _evenly(num_layers: int, stages: int) -> tuple[int, ...]:
    share, more = divmod(num_layers, stages)
    return tuple(share + (stage < more) for stage in range(stages))


def make_plan(
    loss: LossConfig,
    student: ModelSpec,
    teacher: ModelSpec,
    layout: ParallelConfig | None = None,
    teacher_layout: ParallelConfig | None = None,
    section: str = "teacher",
) -> LayerPlan:
    """Return the layer plan of a student and one teacher.

    Args:
        layout: the student's layout; None: one process.
        teacher_layout: the teacher's layout; None: the student's.
        section: the configuration section of the teacher, which errors name.

    Raises:
        UserError: a layer does not exist, a model has fewer layers than stages, or hidden states of different widths
            would be compared without a bridge.
    """
    layout = layout or ParallelConfig()
    pairs = _compared_pairs(loss, student, teacher, section) if loss.reads_layers else ()
    flow = _flow_pairs(loss.flow, student, teacher) if loss.reads_flow else ()
    student_stages = even_stages(student.num_layers, layout.pipeline, layout.virtual_pipeline or 1)
    plan = LayerPlan(
        pairs,
        student.num_layers,
        teacher.num_layers,
        loss.representation.final_norm,
        student_stages,
        (),
        layout.pipeline,
        output=loss.reads_output,
        flow=flow,
        flow_neighbours=loss.flow.adjacent > 0,
    )
    if teacher_layout is None:
        plan = dataclasses.replace(plan, teacher_stages=_align(plan))
        if plan.shares_stages:
            return plan
    else:
        even_stages(teacher.num_layers, teacher_layout.pipeline, key=f"{section}.parallel")
    # Divided evenly up to the highest compared layer; a stage may have no layer.
    stages = _evenly(plan.teacher_last_layer, teacher_layout.pipeline if teacher_layout else len(student_stages))
    return dataclasses.replace(plan, teacher_stages=stages, aligned=False)


def _compared_pairs(loss: LossConfig, student: ModelSpec, teacher: ModelSpec, section: str) -> tuple[LayerPair, ...]:
    """Return the layers that the representation loss compares. Raises UserError if it cannot compare them."""
    config = loss.representation
    is_mapped = config.bridge is not None or config.has_map
    if not is_mapped and student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"student hidden_size {student.hidden_size} differs from {section} hidden_size {teacher.hidden_size}: "
            f"hidden states of another width cannot be compared directly; {MAKE_A_BRIDGE} and name it in "
            "loss.representation.bridge, set loss.representation.map.kind, use a teacher of the student's width, or an "
            "output-space objective alone (loss.representation.weight=0)"
        )
    try:
        depths = student.num_layers, teacher.num_layers
        pairs = layer_pairs(*depths, config.layers, config.pairs)
    except UserError as error:
        raise UserError(str(error) if section == "teacher" else f"with {section}: {error}") from None
    if isinstance(config.layer_weights, list) and len(config.layer_weights) != len(pairs):
        raise UserError(
            f"loss.representation.layer_weights has {len(config.layer_weights)} factors for {len(pairs)} compared "
            "layers; give one for each, in the order of the student's layers"
        )
    return pairs


def _flow_pairs(config: FlowConfig, student: ModelSpec, teacher: ModelSpec) -> tuple[LayerPair, ...]:
    """Return the layers that the loss on hidden flow compares. Raises UserError if it cannot compare them."""
    if config.direction and student.hidden_size != teacher.hidden_size:
        raise UserError(
            f"loss.flow.direction={config.direction:g} compares directions of one width, and student hidden_size "
            f"{student.hidden_size} differs from teacher hidden_size {teacher.hidden_size}; use loss.flow.direction=0"
        )
    flow = layer_pairs(student.num_layers, teacher.num_layers, config.layers, key="loss.flow.layers")
    layers = {pair.student for pair in flow}
    if config.adjacent and not any(layer + 1 in layers for layer in layers):
        raise UserError(
            f"loss.flow.adjacent={config.adjacent:g} compares neighbouring layers, and loss.flow.layers="
            f"{config.layers} has none; use layers all, or adjacent=0"
        )
    return flow


def _align(plan: LayerPlan) -> tuple[int, ...]:
    """Return the number of teacher layers on each stage, so that a stage ends with the highest teacher layer that is
    compared on it or on an earlier stage."""
    needed = [0] * len(plan.student_stages)
    for pair in plan.tapped:
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
