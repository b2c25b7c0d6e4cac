"""The forward pass of the teachers over a global batch: it produces the targets of the student."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import Stage
from megatron_oprd.models.taps import CaptureTap
from megatron_oprd.models.targets import States, TeacherTargets
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import progress
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.schedule import PassSettings, run_schedule
from megatron_oprd.training.target_transfer import (
    RowTransport,
    TeacherStates,
    add_targets,
    exchange_rows,
)
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.types import FINAL_STATES, DeviceBatch


@dataclass
class PassReport:
    """Time and communication of a teacher pass."""

    streamed: bool  # True if the teacher runs while the student trains, micro-batch by micro-batch
    seconds: float = 0.0  # if streamed, part of the student's time
    moved_bytes: int = 0  # hidden states sent between ranks, summed over all ranks


def teacher_pass(
    teachers: Sequence[Teacher],
    global_batch: GlobalBatch,
    micro_batches: Sequence[DeviceBatch],
    topology: Topology,
) -> tuple[TeacherTargets, PassReport]:
    """Run the teachers on the rollouts that each of them teaches.

    Args:
        teachers: in the order of the configuration, which is also how `global_batch.teachers` counts them.
        global_batch: the rollouts of the step.
        micro_batches: the student's micro-batches on this rank, `global_batch.micro_batches(topology)`.
        topology: the student's layout.

    Returns:
        The targets [selected tokens, d_T] of the student's layers on this rank, by micro-batch, and the report.

    Memory: the targets of one micro-batch if a single teacher can be streamed, otherwise those of all micro-batches,
    plus the states of this rank's teacher layers while rows are exchanged.
    Communicates over: the groups of each teacher; the world, point to point, if hidden states move between ranks.
    """
    teachers = [replace(teacher, plan=teacher.plan.for_loss(global_batch.loss)) for teacher in teachers]
    of_teachers = [
        micro_batches
        if len(teachers) == 1 and teacher.shares_micro_batches(topology)
        else _own_micro_batches(global_batch, teacher, number)
        for number, teacher in enumerate(teachers)
    ]
    return run_teachers(teachers, of_teachers, micro_batches, topology)


def _own_micro_batches(global_batch: GlobalBatch, teacher: Teacher, number: int) -> list[DeviceBatch]:
    """Return the micro-batches of a teacher on this rank: none on all ranks if no rollout belongs to the teacher."""
    if number not in global_batch.teachers:
        return []
    return global_batch.micro_batches(teacher.topology, teacher=number)


def run_teachers(
    teachers: Sequence[Teacher],
    teacher_micro_batches: Sequence[Sequence[DeviceBatch]],
    micro_batches: Sequence[DeviceBatch],
    topology: Topology,
    transport: RowTransport = exchange_rows,
) -> tuple[TeacherTargets, PassReport]:
    """Do what `teacher_pass` does, from given micro-batches of each teacher and with a given transport of rows.

    A teacher without micro-batches does not run.
    """
    first = teachers[0]
    keys = first.plan.readers(topology.stages)
    report = PassReport(streamed=len(teachers) == 1 and first.can_stream(topology))
    if report.streamed:
        (own_batches,), stage = teacher_micro_batches, first.load()
        base = _load_base(first)

        def produce(number: int) -> States:
            begin = time.perf_counter()
            with progress.stage("teacher"):
                (states,) = _targets(first, stage, base, own_batches[number : number + 1])
            report.seconds += time.perf_counter() - begin
            return _by_student_layer(first.plan, topology, states)

        return TeacherTargets(keys, topology.device, offload=first.offload, produce=produce), report
    begin = time.perf_counter()
    targets = TeacherTargets(keys, topology.device, offload=first.offload)
    if len(teachers) == 1 and first.targets_are_local(topology):
        captured = _run_teacher(first, 0, teacher_micro_batches[0])
        states = [_by_student_layer(first.plan, topology, one) for one in captured.states]
        del captured  # offloaded targets leave the device one by one
    else:
        states = [{} for _ in micro_batches]
        for number, (teacher, own_batches) in enumerate(zip(teachers, teacher_micro_batches, strict=True)):
            if not own_batches:
                continue
            captured = _run_teacher(teacher, number, own_batches)
            states, sent_bytes = add_targets(states, captured, micro_batches, topology, transport)
            report.moved_bytes += sent_bytes
    while states:
        targets.put(len(states) - 1, states.pop())
    report.seconds = time.perf_counter() - begin
    return targets, report


def _run_teacher(teacher: Teacher, number: int, micro_batches: Sequence[DeviceBatch]) -> TeacherStates:
    """Load the teacher and run it. A model that is loaded for each pass is gone when this returns."""
    stage = teacher.load()
    states = _targets(teacher, stage, _load_base(teacher), micro_batches)
    return TeacherStates.of(teacher, number, micro_batches, states, stage)


def _load_base(teacher: Teacher) -> Stage | None:
    """Return the base that the pass needs, if any."""
    base, plan = teacher.base, teacher.plan
    if base is None or not ((base.layers and plan.pairs) or (base.output and plan.output)):
        return None
    return base.load()


def _targets(teacher: Teacher, stage: Stage, base: Stage | None, micro_batches: Sequence[DeviceBatch]) -> list[States]:
    """Return the targets of the compared layers, for each micro-batch: the teacher's states, extrapolated from a base.

    If the logits are extrapolated, a final state has the base's columns behind the teacher's: only the LM heads turn
    both into logits. The hidden flow stays the teacher's own.
    """
    states = _capture(stage, teacher, micro_batches)
    if base is None:
        return states
    assert teacher.base is not None
    plan = teacher.plan
    pairs = plan.pairs if teacher.base.layers else ()
    plan = replace(plan, pairs=pairs, output=plan.output and teacher.base.output, flow=())
    for of_teacher, of_base in zip(states, _capture(base, replace(teacher, plan=plan), micro_batches), strict=True):
        for key in [*of_base]:
            both = of_teacher[key], of_base.pop(key)
            of_teacher[key] = torch.cat(both, dim=-1) if key == FINAL_STATES else teacher.base.target(*both)
    return states


def _capture(stage: Stage, teacher: Teacher, micro_batches: Sequence[DeviceBatch]) -> list[States]:
    """Return the compared layers of this rank's teacher chunks, for each micro-batch."""
    keys = teacher.plan.teacher_layers(teacher.topology.stages)
    taps = [CaptureTap({key: batch.selection(key).selected for key in keys}, teacher.maps) for batch in micro_batches]
    with teacher.topology.active():
        plan = teacher.plan
        settings = PassSettings(plan.teacher_last_layer, plan.teacher_normed_layer)
        run_schedule(list(stage), teacher.topology, micro_batches, taps, settings)
    return [tap.states for tap in taps]


def _by_student_layer(plan: LayerPlan, topology: Topology, states: States) -> States:
    return {student: states[teacher] for student, teacher in plan.readers(topology.stages).items()}
