"""The teacher reads the student's rollouts; only the states that the loss compares are kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.model import Stage
from megatron_oprd.models.taps import CaptureTap
from megatron_oprd.models.targets import States, TeacherTargets
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.reshard import Shard, exchange, moved_bytes, plan_transfers
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.schedule import run_schedule
from megatron_oprd.types import PackedBatch


@dataclass(frozen=True)
class Teacher:
    """This rank's chunks of the frozen teacher, in the student's layout or one of its own."""

    stage: Stage
    topology: Topology
    offload: bool = False

    def can_stream(self, plan: LayerPlan) -> bool:
        """Whether a micro-batch's states can be made when the student starts it. Between pipeline stages, the teacher's
        activations would have to travel beside the student's: the schedule has no place for them."""
        return plan.aligned and self.topology.pipeline_size == 1


@dataclass
class PassReport:
    """What a teacher pass cost: seconds, within the student's when it is streamed, and the bytes that moved between
    ranks, over all of them."""

    streamed: bool
    seconds: float = 0.0
    moved_bytes: int = 0


def teacher_pass(
    teacher: Teacher,
    student_topology: Topology,
    plan: LayerPlan,
    batches: Sequence[PackedBatch],
    teacher_batches: Sequence[PackedBatch],
) -> tuple[TeacherTargets, PassReport]:
    """The states [selected tokens, d_T] that the student's layers on this rank are compared with, by micro-batch.

    `batches`: this rank's micro-batches in the student's layout, `teacher_batches` in the teacher's (the same ones when
    the plan is aligned). Memory: those of one micro-batch when the teacher can be streamed, else the selected rows of
    the compared layers; for a teacher in its own layout, those of this rank's teacher layers too, while they travel.
    Communicates over the teacher's groups, and from point to point where rows move.
    """
    report = PassReport(streamed=teacher.can_stream(plan))
    readers, device = plan.readers(student_topology.stages), student_topology.device

    def run(some: Sequence[PackedBatch]) -> list[States]:
        begin = time.perf_counter()
        states = _capture(teacher, plan, some)
        report.seconds += time.perf_counter() - begin
        return states

    def produce(number: int) -> States:
        return run(batches[number : number + 1])[0]

    if report.streamed:
        return TeacherTargets(readers, device, offload=teacher.offload, produce=produce), report
    targets = TeacherTargets(readers, device, offload=teacher.offload)
    states = run(teacher_batches)
    if not plan.aligned:
        begin = time.perf_counter()
        states, report.moved_bytes = _move(states, teacher, plan, readers, batches, teacher_batches)
        report.seconds += time.perf_counter() - begin
    for number, of_micro_batch in enumerate(states):
        targets.put(number, of_micro_batch)
    return targets, report


def _capture(teacher: Teacher, plan: LayerPlan, batches: Sequence[PackedBatch]) -> list[States]:
    """The compared layers of this rank's teacher chunks, for each micro-batch."""
    taps = [CaptureTap(frozenset(plan.teacher_layers(teacher.topology.stages)), batch.selected) for batch in batches]
    with teacher.topology.active():
        run_schedule(
            list(teacher.stage),
            teacher.topology,
            batches,
            taps,
            last_layer=None,
            normed_layer=plan.teacher_normed_layer,
            forward_only=True,
        )
    return [tap.states for tap in taps]


def _move(
    states: list[States],
    teacher: Teacher,
    plan: LayerPlan,
    readers: dict[int, int],
    batches: Sequence[PackedBatch],
    teacher_batches: Sequence[PackedBatch],
) -> tuple[list[States], int]:
    """The states of the student's micro-batches on this rank, from where the teacher's ranks have them; and the bytes
    that moved, over all ranks."""
    topology, config = teacher.topology, teacher.stage.config
    held = Shard(plan.teacher_layers(topology.stages), _all_rows(teacher_batches))
    wanted = Shard(tuple(sorted(set(readers.values()))), _all_rows(batches))
    shards = gather_objects((held, wanted), torch.distributed.group.WORLD)
    transfers = plan_transfers([shard for shard, _ in shards], [shard for _, shard in shards])
    joined = {layer: torch.cat([one.pop(layer) for one in states]) for layer in held.layers}
    received = exchange(
        joined,
        held,
        wanted,
        transfers,
        topology.rank,
        hidden=config.hidden_size,
        dtype=config.params_dtype,
        device=topology.device,
        target_device=torch.device("cpu") if teacher.offload else topology.device,
    )
    sizes = [len(batch.rows) for batch in batches]
    by_micro_batch: list[States] = [{} for _ in batches]
    for layer in wanted.layers:
        # Copies, not views of the whole, which would stay until the last of them is read.
        for states_of, part in zip(by_micro_batch, received.pop(layer).split(sizes), strict=True):
            states_of[layer] = part.clone()
    return by_micro_batch, moved_bytes(transfers, config.hidden_size * config.params_dtype.itemsize)


def _all_rows(batches: Sequence[PackedBatch]) -> torch.Tensor:
    return torch.cat([batch.rows for batch in batches]).cpu()
