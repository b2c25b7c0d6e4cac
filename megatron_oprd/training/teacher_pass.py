"""The teachers read the student's rollouts; only the states that the loss compares are kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from megatron_oprd.models.build import build_model
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.models.model import Stage
from megatron_oprd.models.precision import PLAIN, ModelPrecision
from megatron_oprd.models.projection import TeacherMap
from megatron_oprd.models.taps import CaptureTap
from megatron_oprd.models.targets import States, TeacherTargets
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.reshard import Shard, exchange, moved_bytes, plan_transfers
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import progress
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.types import FINAL_STATES, PackedBatch, Selection, StateKey


@dataclass(frozen=True)
class Teacher:
    """This rank's chunks of a frozen teacher, in the student's layout or one of its own.

    `load` gives the chunks with their weights: the same ones each time, or new ones that are gone after the pass.
    `row_width`: of the rows that its states are put into, the hidden size of the widest teacher. `own_prompts`: whether
    it may read other prompts than the student. `maps`: with a bridge, those of its compared layers; what they make of
    the states, r numbers a token, is all that is kept and moved.
    """

    load: Callable[[], Stage]
    topology: Topology
    plan: LayerPlan
    row_width: int
    own_prompts: bool = False
    offload: bool = False
    maps: Mapping[int, TeacherMap] = field(default_factory=dict)

    def shares_micro_batches(self, student_topology: Topology) -> bool:
        """Whether it reads the very micro-batches of the student, as a single teacher."""
        return self.topology is student_topology and not self.own_prompts

    def targets_are_local(self, student_topology: Topology) -> bool:
        """Whether its states are born on the ranks, and in the order, in which the student reads them."""
        cut = student_topology.context_size > 1 or student_topology.sequence_parallel
        return self.plan.aligned and self.topology is student_topology and not (self.own_prompts and cut)

    def can_stream(self, student_topology: Topology) -> bool:
        """Whether a micro-batch's states can be made when the student starts it. Between pipeline stages, the teacher's
        activations would have to travel beside the student's: the schedule has no place for them."""
        return self.targets_are_local(student_topology) and self.topology.pipeline_size == 1


def build_frozen(
    teacher: PlannedTeacher, topology: Topology, dtype: torch.dtype, precision: ModelPrecision = PLAIN
) -> Stage:
    """This rank's chunks of a teacher up to its highest compared layer, without LM head and without weights yet.
    Built without gradients: Transformer Engine then makes no second, transposed copy of FP8 weights. Collective over
    the world."""
    with topology.active(), torch.no_grad():
        return build_model(
            teacher.spec,
            topology,
            dtype,
            stages=teacher.plan.teacher_stages,
            lm_head=False,
            final_norm=teacher.plan.teacher_final_norm,
            precision=precision,
        )


def batches_of_teachers(
    teachers: Sequence[Teacher],
    student_topology: Topology,
    batches: Sequence[PackedBatch],
    pack: Callable[..., Sequence[PackedBatch]],
) -> Callable[[int], Sequence[PackedBatch]]:
    """By a teacher's number, what it reads: the student's own `batches` where it can, else what `pack(topology,
    teacher=number)` makes for it."""

    def read_by(number: int) -> Sequence[PackedBatch]:
        teacher = teachers[number]
        if len(teachers) == 1 and teacher.shares_micro_batches(student_topology):
            return batches
        return pack(teacher.topology, teacher=number)

    return read_by


@dataclass
class PassReport:
    """What a teacher pass cost: seconds, within the student's when it is streamed, and the bytes that moved between
    ranks, over all of them."""

    streamed: bool
    seconds: float = 0.0
    moved_bytes: int = 0


def teacher_pass(
    teachers: Sequence[Teacher],
    student_topology: Topology,
    batches: Sequence[PackedBatch],
    read_by: Callable[[int], Sequence[PackedBatch]],
) -> tuple[TeacherTargets, PassReport]:
    """The states [selected tokens, d_T] that the student's layers on this rank are compared with, by micro-batch.

    `batches`: this rank's micro-batches of the student; `read_by(number)`: those of a teacher, in its own layout, with
    the rollouts that it teaches. Memory: the states of one micro-batch when a single teacher can be streamed, else the
    selected rows of the compared layers; where they travel, those of this rank's teacher layers too while they do.
    Communicates over the teachers' groups, and from point to point where rows move.
    """
    first = teachers[0]
    layers, device = first.plan.readers(student_topology.stages), student_topology.device
    report = PassReport(streamed=len(teachers) == 1 and first.can_stream(student_topology))
    if report.streamed:
        stage, own_batches = first.load(), read_by(0)

        def produce(number: int) -> States:
            begin = time.perf_counter()
            with progress.stage("teacher"):
                (states,) = _capture(stage, first, own_batches[number : number + 1])
            report.seconds += time.perf_counter() - begin
            return _by_student_layer(first.plan, student_topology, states)

        return TeacherTargets(layers, device, offload=first.offload, produce=produce), report
    begin = time.perf_counter()
    targets = TeacherTargets(layers, device, offload=first.offload)
    held: list[States] = [{} for _ in batches]
    for number, teacher in enumerate(teachers):
        stays = len(teachers) == 1 and teacher.targets_are_local(student_topology)
        report.moved_bytes += _read(teacher, number, stays, student_topology, batches, read_by(number), held)
    while held:
        targets.put(len(held) - 1, held.pop())
    report.seconds = time.perf_counter() - begin
    return targets, report


def _read(
    teacher: Teacher,
    number: int,
    stays: bool,
    student_topology: Topology,
    batches: Sequence[PackedBatch],
    own_batches: Sequence[PackedBatch],
    held: list[States],
) -> int:
    """One teacher's pass, its states put into `held` where the student reads them; the bytes that moved, over all
    ranks. What `load` made for this pass alone is gone at its end."""
    stage = teacher.load()
    states = _capture(stage, teacher, own_batches)
    if not stays:
        return _move(states, stage, teacher, number, student_topology, batches, own_batches, held)
    for of_batch, captured in zip(held, states, strict=True):
        of_batch.update(_by_student_layer(teacher.plan, student_topology, captured))
    return 0


def _capture(stage: Stage, teacher: Teacher, batches: Sequence[PackedBatch]) -> list[States]:
    """The compared layers of this rank's teacher chunks, for each micro-batch."""
    layers = teacher.plan.teacher_layers(teacher.topology.stages)
    taps = [
        CaptureTap({layer: _selection(batch, layer).selected for layer in layers}, teacher.maps) for batch in batches
    ]
    with teacher.topology.active():
        run_schedule(
            list(stage),
            teacher.topology,
            batches,
            taps,
            last_layer=None,
            normed_layer=teacher.plan.teacher_normed_layer,
            forward_only=True,
        )
    return [tap.states for tap in taps]


def _by_student_layer(plan: LayerPlan, topology: Topology, states: States) -> States:
    return {student: states[teacher] for student, teacher in plan.readers(topology.stages).items()}


def _move(
    states: list[States],
    stage: Stage,
    teacher: Teacher,
    number: int,
    student_topology: Topology,
    batches: Sequence[PackedBatch],
    own_batches: Sequence[PackedBatch],
    held: list[States],
) -> int:
    """Bring a teacher's states from where its ranks have them to where the student's layers read them: into `held`, by
    the student's micro-batches and layers. Returns the bytes that moved, over all ranks."""
    plan, moved = teacher.plan, 0
    readers = plan.readers(student_topology.stages)
    terms = [lambda layer: layer != FINAL_STATES] if plan.pairs else []
    terms += [lambda layer: layer == FINAL_STATES] if plan.output else []
    for belongs in terms:  # one reads other rows than the other
        sources = tuple(filter(belongs, plan.teacher_layers(teacher.topology.stages)))
        layers = tuple(sorted(filter(belongs, set(readers.values()))))
        some_layer = FINAL_STATES if belongs(FINAL_STATES) else 1
        mine = [_selection(batch, some_layer) for batch in batches]
        places = [(selection.teachers == number).nonzero().flatten() for selection in mine]
        row = _row(teacher, stage, some_layer)
        received, moved_by_term = _exchange(
            states,
            Shard(sources, _joined([_selection(batch, some_layer).rows for batch in own_batches])),
            Shard(layers, _joined([one.rows[place] for one, place in zip(mine, places, strict=True)])),
            row,
            teacher,
        )
        moved += moved_by_term
        width = row.width if teacher.maps else teacher.row_width  # a bridge has a single teacher
        for layer in layers:
            parts = received.pop(layer).split([len(place) for place in places])
            for of_batch, selection, place, part in zip(held, mine, places, parts, strict=True):
                students = [student for student, read in readers.items() if read == layer]
                _lay_down(of_batch, students, selection, place, part, width)
    return moved


def _lay_down(
    held: States,
    layers: Sequence[StateKey],
    selection: Selection,
    places: torch.Tensor,
    states: torch.Tensor,
    width: int,
) -> None:
    """Put `states` [places, d_T] where they belong among the rows [selection, width] of a micro-batch, for each of the
    student's `layers`. What a narrower teacher leaves of its rows is never read."""
    if len(places) == len(selection) and states.shape[1] == width:
        # One tensor for all: they are compared with the same. A copy, as a view would keep the whole that it is cut of.
        held |= dict.fromkeys(layers, states.clone())
        return
    for layer in layers if len(places) or not len(selection) else ():
        target = held.setdefault(layer, states.new_empty(len(selection), width))
        target[places.to(target.device), : states.shape[1]] = states.to(target.device)


@dataclass(frozen=True)
class Row:
    """What is kept of a teacher at one token of a layer."""

    width: int
    dtype: torch.dtype


def _row(teacher: Teacher, stage: Stage, layer: StateKey) -> Row:
    """Of any of the layers that are compared, or of FINAL_STATES."""
    dtype: torch.dtype = stage.config.params_dtype
    if layer == FINAL_STATES or not teacher.maps:
        return Row(stage.config.hidden_size, dtype)
    return Row(next(iter(teacher.maps.values())).rank, torch.promote_types(dtype, torch.float32))


def _exchange(states: list[States], held: Shard, wanted: Shard, row: Row, teacher: Teacher) -> tuple[States, int]:
    """This rank's rows of the wanted layers, and the bytes that moved over all ranks. Takes `states` apart.
    Communicates over the world."""
    topology = teacher.topology
    shards = gather_objects((held, wanted), torch.distributed.group.WORLD)
    transfers = plan_transfers([shard for shard, _ in shards], [shard for _, shard in shards])
    joined = {layer: torch.cat([one.pop(layer) for one in states]) for layer in held.layers}
    received = exchange(
        joined,
        held,
        wanted,
        transfers,
        topology.rank,
        hidden=row.width,
        dtype=row.dtype,
        device=topology.device,
        target_device=torch.device("cpu") if teacher.offload else topology.device,
    )
    return received, moved_bytes(transfers, row.width * row.dtype.itemsize)


def _selection(batch: PackedBatch, layer: StateKey) -> Selection:
    """What is read of a layer."""
    return batch.output if layer == FINAL_STATES else batch.representation


def _joined(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat(list(rows)).cpu()
