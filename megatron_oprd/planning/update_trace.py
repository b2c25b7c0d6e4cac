"""The memory of one update, followed without allocating it: the real models, optimizer and schedules of one rank, on
tensors that have sizes and no values, beside ranks that do not exist."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_oprd.config import Config
from megatron_oprd.models.build import DTYPES, ModelPart, build_model
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.models.projection import student_maps, teacher_maps
from megatron_oprd.models.taps import StudentTap
from megatron_oprd.models.targets import States
from megatron_oprd.parallel.reshard import Shard, TargetShape
from megatron_oprd.parallel.topology import Topology, build_topology
from megatron_oprd.planning.device_formulas import BYTES, as_traced, fp8_candidates, linear_bytes, optimizer_state_bytes
from megatron_oprd.planning.megatron_patches import announce_rows, patched, tracing_patches
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student import Student, build_student
from megatron_oprd.training.student_step import accumulate_gradients, stage_loss
from megatron_oprd.training.teacher import Teacher, build_frozen
from megatron_oprd.training.teacher_pass import run_teachers
from megatron_oprd.types import DeviceBatch, LayerPair, ModelSpec, PairBridge, Rollout

DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at the moment of an update when most are alive."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher_weights: int = 0  # of the teachers that are in memory, and their LM heads
    targets: int = 0  # states of the teachers that wait for the student
    activations: int = 0  # the rest, temporaries among it

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


def trace_update(run: PlannedRun, rollouts: Sequence[Rollout], *, rank: int, micro_batches: int = 1) -> Footprint:
    """Return the footprint of one rank at the peak of an update: teacher pass, forward, backward, optimizer step.

    The optimizer has its state already. Every expert gets the same number of tokens. No communication.

    Args:
        run: The run.
        rollouts: The rollouts of one micro-batch, which they must fill.
        rank: The rank, of `run.world_size`.
        micro_batches: The number of such micro-batches that every replica has in a step.

    Raises:
        RuntimeError: This process has a CUDA device or belongs to a process group.
    """
    if torch.cuda.is_available():
        raise RuntimeError("an update is traced on a CPU: hide the CUDA devices (CUDA_VISIBLE_DEVICES='')")
    student, planned, asked = run.student, list(run.teachers.values()), run.config
    config = as_traced(asked)
    live = LiveBytes()
    with _only_rank(rank, run.world_size), patched(tracing_patches(live)):
        own = [build_topology(t.layout, DEVICE, config.train.seed) if t.layout else None for t in planned]
        topology = build_topology(config.parallel, DEVICE, config.train.seed)  # the last one stays in force
        topologies = [of_teacher or topology for of_teacher in own]
        places = [(topology, _micro_batch(config, student, topology, rollouts))]
        places += [(one, _micro_batch(config, student, one, rollouts, number)) for number, one in enumerate(topologies)]
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, live:
            with live.making("weights"):
                bridge = _bridge(student, planned[0], run.bridge_rank) if run.bridge_rank is not None else {}
            models = _build(config, asked, student, planned, places, bridge, live)
            with live.making("activations"):
                mine, *read = (_without_values(batch, mode) for _, batch in places)
                live.reset_peak()
                _update(config, models, mine, read, micro_batches, live)
        footprint = Footprint(**live.at_peak)
        on_device = footprint.optimizer * optimizer_state_bytes(asked) / (optimizer_state_bytes(config) or 1)
        return dataclasses.replace(footprint, optimizer=math.ceil(on_device))


@contextlib.contextmanager
def _only_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one rank of a process group whose other ranks do not exist: messages go nowhere and bring no values."""
    if dist.is_initialized():
        raise RuntimeError("an update is traced outside of any process group")
    cpu_stand_ins.install()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _micro_batch(
    config: Config, student: ModelSpec, topology: Topology, rollouts: Sequence[Rollout], teacher: int | None = None
) -> DeviceBatch:
    """What this rank reads of one micro-batch, as the student or as a teacher, who then teaches all of it."""
    one_replica = dataclasses.replace(topology, data_size=1, data_rank=0, virtual_size=1)
    teachers = (teacher or 0,) * len(rollouts)
    global_batch = GlobalBatch(tuple(rollouts), teachers, config.loss, config.batch, student)
    batches = global_batch.micro_batches(one_replica, teacher=teacher)
    if len(batches) != 1:
        raise ValueError(f"the rollouts fill {len(batches)} micro-batches, not one")
    return batches[0]


def _without_values(batch: Any, mode: FakeTensorMode) -> Any:
    """The micro-batch, or a selection of it, but for the values of its tensors."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    for name, value in fields.items():
        if dataclasses.is_dataclass(value) and name != "host":  # the host form keeps its values
            fields[name] = _without_values(value, mode)
        elif isinstance(value, torch.Tensor):
            fields[name] = mode.from_tensor(value).clone()
    return type(batch)(**fields)


def _bridge(student: ModelSpec, teacher: PlannedTeacher, rank: int) -> dict[LayerPair, PairBridge]:
    """A bridge without values."""
    width = teacher.spec.hidden_size
    maps = PairBridge(torch.empty(rank, student.hidden_size), torch.empty(rank, width), torch.empty(width))
    return dict.fromkeys(teacher.plan.pairs, maps)


@dataclass(frozen=True)
class _Models:
    student: Student
    topology: Topology
    teachers: list[Teacher]
    output: OutputLoss | None
    fp8_copies: torch.Tensor  # of the student's weights


def _build(
    config: Config,
    asked: Config,
    spec: ModelSpec,
    planned: Sequence[PlannedTeacher],
    places: Sequence[tuple[Topology, DeviceBatch]],
    bridge: Mapping[LayerPair, PairBridge],
    live: LiveBytes,
) -> _Models:
    """All models of this rank as the first update leaves them. `asked`: the configuration with what only a device does.
    `places`: of the student and of each teacher, the layout and a micro-batch."""
    (topology, batch), *of_teachers = places
    plan = planned[0].plan
    width = max(teacher.spec.hidden_size for teacher in planned)
    teachers = [
        _teacher(config, asked, teacher, *place, width, bridge, live)
        for teacher, place in zip(planned, of_teachers, strict=True)
    ]
    with live.making("optimizer"):  # what construction and first step leave, but for what gets another name
        dtype = DTYPES[config.precision.dtype]
        stage = build_model(spec, topology, dtype, ModelPart(plan.student_stages), recompute=config.recompute)
        maps = student_maps(bridge, DEVICE, trained=config.loss.representation.train_bridge)
        student = build_student(_with_messages(stage, topology, batch), config, plan, topology, maps)
        with cpu_stand_ins.cpu_devices():
            student.optimizer.step()
    buffers = [buffer for chunk in student.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    live.assign("weights", [*stage.parameters(), *(chunk.rotary.inverse_frequencies for chunk in stage)])
    in_fp8 = sum(weight.numel() for weight in fp8_candidates(stage, asked, spec.num_layers))
    with live.making("weights"):
        copies = torch.empty(
            in_fp8 * (linear_bytes(asked, teacher=False) - BYTES[config.precision.dtype]), dtype=torch.uint8
        )
    live.assign("gradients", [buffer.grad_data for buffer in buffers])
    output = None
    if plan.output and topology.num_stages - 1 in topology.stages:
        with live.making("teacher_weights"):
            heads = _heads(spec, planned, stage, topology)
        objective, temperature = config.loss.output, config.rollout.temperature
        with_metrics = objective.metrics_every > 0
        output = OutputLoss(objective, heads, topology, temperature=temperature, with_metrics=with_metrics)
    return _Models(student, topology, teachers, output, copies)


def _teacher(
    config: Config,
    asked: Config,
    planned: PlannedTeacher,
    topology: Topology,
    batch: DeviceBatch,
    row_width: int,
    bridge: Mapping[LayerPair, PairBridge],
    live: LiveBytes,
) -> Teacher:
    def load() -> Stage:
        with live.making("teacher_weights"):
            stage = build_frozen(planned, topology, DTYPES[config.precision.dtype])
        for weight in fp8_candidates(stage, asked, sum(planned.plan.teacher_stages)):
            live.resize(weight, weight.numel() * linear_bytes(asked, teacher=True))
        return _with_messages(stage, topology, batch).eval().requires_grad_(False)

    kept = load() if config.teachers_in_memory == "all" else None
    own_prompts = config.data.own_teacher_prompts
    return Teacher(
        load if kept is None else lambda: kept,
        topology,
        planned.plan,
        row_width,
        own_prompts=own_prompts,
        maps=teacher_maps(bridge, DEVICE),
    )


def _heads(spec: ModelSpec, planned: Sequence[PlannedTeacher], stage: Stage, topology: Topology) -> Heads:
    head = stage[-1].lm_head
    first = topology.tensor_rank * len(head)
    vocab_size = min(spec.vocab_size, *(teacher.spec.vocab_size for teacher in planned))
    rows = max(min(first + len(head), vocab_size), first) - first
    return Heads(head, tuple(head.new_empty(rows, teacher.spec.hidden_size) for teacher in planned), first)


def _with_messages(stage: Stage, topology: Topology, batch: DeviceBatch) -> Stage:
    announce_rows(stage, batch.num_tokens // (topology.tensor_size if topology.sequence_parallel else 1))
    return stage


def _rows_received(
    states: list[States], held: Shard, wanted: Shard, row: TargetShape, teacher: Teacher
) -> tuple[States, int]:
    """What `teacher_pass` has in memory when rows have come from other ranks."""
    joined = {layer: torch.cat([one.pop(layer) for one in states]) for layer in held.layers}
    shape = (len(wanted.rows), row.width)
    received = {layer: torch.empty(shape, dtype=row.dtype) for layer in wanted.layers}
    del joined  # until now
    return received, 0


def _update(
    config: Config,
    models: _Models,
    batch: DeviceBatch,
    read: Sequence[DeviceBatch],
    micro_batches: int,
    live: LiveBytes,
) -> None:
    """The teacher pass, and the update, on as many micro-batches as keep every pipeline rank busy; of the others there
    are the targets alone."""
    topology = models.topology
    rounds = topology.pipeline_size if topology.virtual_size > 1 else 1  # of the interleaved schedule
    count = min(-(-micro_batches // rounds) * rounds, 2 * topology.pipeline_size)
    of_teachers = [[of_teacher] * count for of_teacher in read]
    targets, _ = run_teachers(models.teachers, of_teachers, [batch] * count, topology, _rows_received)
    if len(targets):
        for number in range(count):
            live.assign("targets", [targets.read(number, layer) for layer in targets.layers])
    with live.making("targets"):
        waiting = torch.empty(max(micro_batches - count, 0) * targets.num_bytes // count, dtype=torch.uint8)

    def taps() -> Iterator[StudentTap]:
        for number in range(count):
            tap = stage_loss(models.student, config.loss, batch, targets.of(number), models.output)
            live.assign("targets", [targets.read(number, layer) for layer in targets.layers])
            yield tap

    accumulate_gradients(models.student, [batch] * count, taps())
    del waiting
    with cpu_stand_ins.cpu_devices():
        models.student.optimizer.step()
