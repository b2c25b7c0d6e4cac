"""Move hidden states of a teacher from the ranks that computed them to the ranks whose student layers need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.models.model import Stage
from megatron_oprd.models.targets import States
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.reshard import RankExchange, Shard, TargetShape, exchange, moved_bytes, plan_transfers
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.types import FINAL_STATES, DeviceBatch, FlowKey, StateKey


@dataclass(frozen=True)
class TeacherStates:
    """The compared layers of one teacher on this rank, at the selected tokens of its own micro-batches."""

    teacher: Teacher
    number: int  # of the teacher, in the order of the configuration
    micro_batches: Sequence[DeviceBatch]
    states: list[States]  # by micro-batch: teacher key -> [selected tokens, d_T]
    hidden_size: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, teacher: Teacher, number: int, micro_batches: Sequence[DeviceBatch], states: list[States], stage: Stage
    ) -> TeacherStates:
        """Wrap the states that `stage` computed; the model itself is not kept."""
        return cls(teacher, number, micro_batches, states, stage.config.hidden_size, stage.config.params_dtype)

    def shape(self, key: StateKey) -> TargetShape:
        """Return the format of the states with this key: with a bridge, layers have r columns."""
        if key == FINAL_STATES:
            has_base = self.teacher.base is not None and self.teacher.base.output
            return TargetShape(self.hidden_size * (1 + has_base), self.dtype)
        if not isinstance(key, int) or not self.teacher.maps:
            return TargetShape(self.hidden_size, self.dtype)
        rank = next(iter(self.teacher.maps.values())).rank
        return TargetShape(rank, torch.promote_types(self.dtype, torch.float32))


# Moves rows between ranks: (states by micro-batch, rows of this rank, rows that this rank needs, format, teacher) ->
# (teacher key -> [needed rows, width], bytes sent by all ranks).
RowTransport = Callable[[list[States], Shard, Shard, TargetShape, Teacher], tuple[States, int]]


def exchange_rows(
    states: list[States], available: Shard, needed: Shard, shape: TargetShape, teacher: Teacher
) -> tuple[States, int]:
    """Send this rank's rows of a teacher's layers, and receive the rows that its student layers need.

    Removes the layers of `available` from `states`, so that their memory is free as soon as they are joined.

    Returns: {teacher key: [needed rows, width]}, in CPU memory if the teacher's targets are offloaded, and the bytes
    that all ranks sent.
    Communicates over: the world.
    """
    topology = teacher.topology
    shards = gather_objects((available, needed), torch.distributed.group.WORLD)
    transfers = plan_transfers([shard for shard, _ in shards], [shard for _, shard in shards])
    joined = {layer: torch.cat([one.pop(layer) for one in states]) for layer in available.layers}
    plan = RankExchange(topology.rank, available, needed, transfers)
    target_device = torch.device("cpu") if teacher.offload else topology.device
    received = exchange(joined, plan, shape, topology.device, target_device)
    return received, moved_bytes(transfers, shape.width * shape.dtype.itemsize)


def add_targets(
    targets: Sequence[States],
    captured: TeacherStates,
    micro_batches: Sequence[DeviceBatch],
    topology: Topology,
    transport: RowTransport = exchange_rows,
) -> tuple[list[States], int]:
    """Move one teacher's states to the student's layers and add them to the targets.

    Args:
        targets: what earlier teachers contributed, by micro-batch of the student: student key -> [selected, width].
        captured: the teacher's states on this rank. Its tensors are taken out.
        micro_batches: the student's micro-batches on this rank.
        topology: the student's layout.
        transport: how rows move between ranks.

    Returns: the targets with the rows of this teacher, and the bytes that all ranks sent.
    Communicates over: the world.
    """
    teacher, plan, total_bytes = captured.teacher, captured.teacher.plan, 0
    readers = plan.readers(topology.stages)
    targets = list(targets)
    terms: list[set[StateKey]] = [
        {pair.teacher for pair in plan.pairs},
        {FINAL_STATES} if plan.output else set(),
        {FlowKey(pair.teacher) for pair in plan.flow},
    ]
    for keys in filter(None, terms):  # each term of the loss selects its own tokens
        some_key = next(iter(keys))
        own_keys = tuple(key for key in plan.teacher_layers(teacher.topology.stages) if key in keys)
        needed_keys = tuple(sorted(keys.intersection(readers.values())))
        own_rows = [batch.host.selection(some_key).token_numbers for batch in captured.micro_batches]
        selections = [batch.host.selection(some_key) for batch in micro_batches]
        places = [(selection.teachers == captured.number).nonzero().flatten() for selection in selections]
        needed_rows = [one.token_numbers[place] for one, place in zip(selections, places, strict=True)]
        shape = captured.shape(some_key)
        received, sent_bytes = transport(
            captured.states,
            Shard(own_keys, torch.cat(own_rows)),
            Shard(needed_keys, torch.cat(needed_rows)),
            shape,
            teacher,
        )
        total_bytes += sent_bytes
        width = shape.width if teacher.maps else teacher.width_of_rows(some_key)  # a bridge has a single teacher
        for key in needed_keys:
            students = [student for student, of_teacher in readers.items() if of_teacher == key]
            parts = received.pop(key).split([len(place) for place in places])
            targets = [
                _add_rows(*one, students, width)
                for one in zip(targets, parts, places, map(len, selections), strict=True)
            ]
    return targets, total_bytes


def _add_rows(
    targets: States,
    rows: torch.Tensor,
    places: torch.Tensor,
    num_rows: int,
    keys: Sequence[StateKey],
    width: int,
) -> States:
    """Return the targets of a micro-batch with `rows` [places, d_T] at `places`, for each of the student's `keys`.

    A target has a row of `width` columns for every selected token. A narrower teacher leaves the last columns unset;
    nothing reads them.
    """
    if len(places) == num_rows and rows.shape[1] == width:
        # All keys share one tensor. It is a copy, because a view would keep the rows of all micro-batches alive.
        return targets | dict.fromkeys(keys, rows.clone())
    if not len(places) and num_rows:
        return targets
    added = {}
    for key in keys:
        target = targets[key] if key in targets else rows.new_empty(num_rows, width)
        target[places.to(target.device), : rows.shape[1]] = rows.to(target.device)
        added[key] = target
    return targets | added
