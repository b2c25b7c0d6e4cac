"""Trace the memory of one update without allocating it.

The models, optimizer and schedules of one rank are real. Their tensors have shapes and no values, and the other ranks
do not exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_oprd.launch.models import start_topologies
from megatron_oprd.models.recompute import Recomputation, set_parts, set_recomputation
from megatron_oprd.models.taps import StudentTap
from megatron_oprd.models.targets import States
from megatron_oprd.parallel.reshard import Shard, TargetShape
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.planning.device_formulas import optimizer_state_bytes
from megatron_oprd.planning.fused_modules import fused_patches
from megatron_oprd.planning.megatron_patches import patched, tracing_patches
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.traced_models import (
    MicroBatches,
    TracedModels,
    build_traced_models,
    without_device_features,
)
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student_step import accumulate_gradients, stage_loss
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.training.teacher_pass import run_teachers
from megatron_oprd.types import DeviceBatch, Rollout


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at the peak of an update, by purpose."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    teacher_weights: int = 0  # of the teachers in memory, and their LM heads
    targets: int = 0  # hidden states of the teachers that wait for the student
    activations: int = 0  # all other tensors: stored activations, the loss, temporary tensors

    @property
    def peak(self) -> int:
        return sum(dataclasses.astuple(self))


def trace_update(run: PlannedRun, rollouts: Sequence[Rollout], *, rank: int, micro_batches: int = 1) -> Footprint:
    """Return the footprint of one rank at the peak of an update: teacher pass, forward, backward, optimizer step.

    Arguments and errors: those of `traced_update`.
    """
    with traced_update(run, rollouts, rank=rank, micro_batches=micro_batches) as update:
        return update.footprint()


@contextlib.contextmanager
def traced_update(
    run: PlannedRun, rollouts: Sequence[Rollout], *, rank: int, micro_batches: int = 1
) -> Iterator[TracedUpdate]:
    """Build the models of one rank without memory, and trace updates inside the block.

    The optimizer has its state already. Every expert gets the same number of tokens. No communication.

    Args:
        run: The run.
        rollouts: The rollouts of one micro-batch, which they must fill.
        rank: The rank, of `run.setup.world_size`.
        micro_batches: The number of such micro-batches that every replica has in a step.

    Raises:
        RuntimeError: This process has a CUDA device or belongs to a process group.
    """
    if torch.cuda.is_available():
        raise RuntimeError("an update is traced on a CPU: hide the CUDA devices (CUDA_VISIBLE_DEVICES='')")
    traced, live = without_device_features(run), LiveBytes()
    fused = fused_patches() if run.setup.precision.student.transformer_engine else []
    with _only_rank(rank, run.setup.world_size), patched([*tracing_patches(live), *fused]):
        topologies = start_topologies(traced.config, traced.setup)
        batches = MicroBatches(
            _micro_batch(traced, topologies.student, rollouts),
            tuple(_micro_batch(traced, one, rollouts, number) for number, one in enumerate(topologies.teachers)),
        )
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, live:
            models = build_traced_models(run, topologies, batches, live)
            with live.making("activations"):
                batches = MicroBatches(
                    _without_values(batches.student, mode),
                    tuple(_without_values(batch, mode) for batch in batches.teachers),
                )
                yield TracedUpdate(run, traced, models, topologies.student, batches, micro_batches, live)


@dataclass
class TracedUpdate:
    """An update of one rank on tensors without values. It can be traced again with another recomputation."""

    run: PlannedRun
    traced: PlannedRun  # without the features that need a CUDA device
    models: TracedModels
    topology: Topology
    batches: MicroBatches
    micro_batches: int  # of a replica in a step
    live: LiveBytes
    stored: list[int] = field(default_factory=list)  # bytes that each block stored in the last forward pass
    _optimizer_step: Footprint | None = None  # the peak of the optimizer's step, which does not depend on recomputation

    @property
    def blocks(self) -> list[TransformerLayer]:
        """Return the blocks of the student on this rank, lowest first."""
        return [layer for chunk in self.models.student.stage for layer in chunk.decoder.layers]

    def footprint(
        self, recomputation: Recomputation | None = None, parts: Mapping[int, frozenset[str]] | None = None
    ) -> Footprint:
        """Return the footprint of an update.

        Args:
            recomputation: The recomputation; None: that of the configuration, or of the update before.
            parts: Other recomputed parts for some blocks, by their index in `blocks`.
        """
        if recomputation is not None:
            set_recomputation(self.models.student.stage, recomputation)
        for number, names in (parts or {}).items():
            set_parts(self.blocks[number], names)
        self.live.reset_peak()
        with self._storage_noted():
            self._passes()
        passes = self._at_peak()
        if self._optimizer_step is None:
            self.live.reset_peak()
            if not self.run.setup.precision.student.transformer_engine:  # its fused AdamW makes no tensors
                with cpu_stand_ins.cpu_devices():
                    self.models.student.optimizer.step()
            self._optimizer_step = self._at_peak()
        return max(passes, self._optimizer_step, key=lambda footprint: footprint.peak)

    def _passes(self) -> None:
        _update(self.traced, self.models, self.topology, self.batches, self.micro_batches, self.live)

    @contextlib.contextmanager
    def _storage_noted(self) -> Iterator[None]:
        """Fill `stored` with the growth of the activations in the first forward pass of each block."""
        before: dict[int, int] = {}
        after: dict[int, int] = {}

        def note(known: dict[int, int], number: int) -> None:
            known.setdefault(number, self.live.bytes["activations"])

        hooks = []
        for number, block in enumerate(self.blocks):
            hooks.append(block.register_forward_pre_hook(lambda *_, number=number: note(before, number)))
            hooks.append(block.register_forward_hook(lambda *_, number=number: note(after, number)))
        yield
        for hook in hooks:
            hook.remove()
        self.stored = [after.get(number, 0) - before.get(number, 0) for number in range(len(self.blocks))]

    def _at_peak(self) -> Footprint:
        footprint = Footprint(**self.live.at_peak)
        traced_state = optimizer_state_bytes(self.traced.config) or 1
        on_device = footprint.optimizer * optimizer_state_bytes(self.run.config) / traced_state
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
    run: PlannedRun, topology: Topology, rollouts: Sequence[Rollout], teacher: int | None = None
) -> DeviceBatch:
    """Return this rank's part of one micro-batch: of the student, or of a teacher that teaches all rollouts."""
    one_replica = dataclasses.replace(topology, data_size=1, data_rank=0, virtual_size=1)
    teachers, config = (teacher or 0,) * len(rollouts), run.config
    global_batch = GlobalBatch(tuple(rollouts), teachers, config.loss, config.batch, run.setup.student)
    batches = global_batch.micro_batches(one_replica, teacher=teacher)
    if len(batches) != 1:
        raise ValueError(f"the rollouts fill {len(batches)} micro-batches, not one")
    return batches[0]


def _without_values(batch: Any, mode: FakeTensorMode) -> Any:
    """Return a micro-batch, or a selection of it, with tensors that have no values."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    for name, value in fields.items():
        if dataclasses.is_dataclass(value) and name != "host":  # the host form keeps its values
            fields[name] = _without_values(value, mode)
        elif isinstance(value, torch.Tensor):
            fields[name] = mode.from_tensor(value).clone()
    return type(batch)(**fields)


def _receive_rows(
    states: list[States], own: Shard, wanted: Shard, shape: TargetShape, teacher: Teacher
) -> tuple[States, int]:
    """Do what `exchange_rows` does to the memory of this rank, without other ranks."""
    joined = {layer: torch.cat([one.pop(layer) for one in states]) for layer in own.layers}
    received = {layer: torch.empty((len(wanted.rows), shape.width), dtype=shape.dtype) for layer in wanted.layers}
    del joined  # until all rows are received
    return received, 0


def _update(
    run: PlannedRun,
    models: TracedModels,
    topology: Topology,
    batches: MicroBatches,
    micro_batches: int,
    live: LiveBytes,
) -> None:
    """Run the teacher pass, forward and backward on as many micro-batches as keep every pipeline rank busy.

    Of the other micro-batches, only the targets are in memory.
    """
    rounds = topology.pipeline_size if topology.virtual_size > 1 else 1  # of the interleaved schedule
    count = min(-(-micro_batches // rounds) * rounds, 2 * topology.pipeline_size)
    student_batches = [batches.student] * count
    teacher_batches = [[batch] * count for batch in batches.teachers]
    targets, _ = run_teachers(models.teachers, teacher_batches, student_batches, topology, _receive_rows)
    if len(targets):
        for number in range(count):
            live.assign("targets", [targets.read(number, layer) for layer in targets.layers])
    with live.making("targets"):
        waiting = torch.empty(max(micro_batches - count, 0) * targets.num_bytes // count, dtype=torch.uint8)

    def taps() -> Iterator[StudentTap]:
        for number, batch in enumerate(student_batches):
            tap = stage_loss(models.student, run.config.loss, batch, targets.of(number), models.output)
            live.assign("targets", [targets.read(number, layer) for layer in targets.layers])
            yield tap

    accumulate_gradients(models.student, student_batches, taps())
    del waiting
