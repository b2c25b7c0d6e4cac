"""The models of a traced run: built like those of a real run, without weights, and counted by purpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_oprd.config import Config
from megatron_oprd.launch.models import (
    ModelInputs,
    NoWeights,
    Topologies,
    build_student_stage,
    build_teachers,
    build_trained_student,
    follow_student,
    load_heads,
    output_loss,
)
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.models.precision import Precision
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.planning.device_formulas import BYTES, as_traced, fp8_candidates, linear_bytes
from megatron_oprd.planning.megatron_patches import announce_rows
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.training.student import Student
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.types import DeviceBatch, LayerPair, PairBridge


@dataclass(frozen=True)
class MicroBatches:
    """The micro-batch of this rank for the student and for each teacher."""

    student: DeviceBatch
    teachers: tuple[DeviceBatch, ...]  # in the order of the configuration


@dataclass(frozen=True)
class TracedModels:
    """The models of one rank, after the first update created the optimizer's state."""

    inputs: ModelInputs  # a run has the maps of its bridge in memory until it ends
    student: Student
    teachers: tuple[Teacher, ...]
    output: OutputLoss | None  # on the student's last stage
    fp8_copies: torch.Tensor  # stands for the FP8 copies of the student's weights


def without_device_features(run: PlannedRun) -> PlannedRun:
    """Return the run without the features that need a CUDA device."""
    setup = dataclasses.replace(run.setup, precision=Precision())
    return dataclasses.replace(run, config=as_traced(run.config), setup=setup)


def build_traced_models(
    run: PlannedRun, topologies: Topologies, micro_batches: MicroBatches, live: LiveBytes
) -> TracedModels:
    """Build the models of one rank as a run does, and count their tensors by purpose.

    Args:
        run: The run. Its FP8 weights are built in `precision.dtype` and counted by formula.
        topologies: The layouts.
        micro_batches: The micro-batches, whose sizes pipeline stages would tell each other.
        live: The counter, active above a FakeTensorMode.
    """
    inputs, weights, topology = _model_inputs(run, live), NoWeights(), topologies.student
    config, setup = inputs.config, inputs.setup
    with live.making("optimizer"):  # weights and gradients are assigned to their purpose below
        stage = build_student_stage(config, setup, topology, weights)
        announce_rows(stage, _rows_per_stage(micro_batches.student, topology))
        student = build_trained_student(inputs, stage, topology)
        with cpu_stand_ins.cpu_devices():
            student.optimizer.step()
    buffers = [buffer for chunk in student.ddp for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    live.assign("weights", [*stage.parameters(), *(chunk.rotary.inverse_frequencies for chunk in stage)])
    live.assign("gradients", [buffer.grad_data for buffer in buffers])
    in_fp8 = sum(weight.numel() for weight in fp8_candidates(stage, run.config, setup.student.num_layers))
    copy_bytes = linear_bytes(run.config, teacher=False) - BYTES[config.precision.dtype]
    with live.making("weights"):
        fp8_copies = torch.empty(in_fp8 * copy_bytes, dtype=torch.uint8)
    with live.making("teacher_weights"):
        built = build_teachers(inputs, topologies, weights)
        heads = load_heads(inputs, stage, topology, weights) if setup.layer_plan.output else None
        student = follow_student(inputs, student, built, heads)
    teachers = tuple(
        _count_weights(teacher, run.config, batch, live)
        for teacher, batch in zip(built, micro_batches.teachers, strict=True)
    )
    with_metrics = config.loss.output.metrics_every > 0
    temperature = config.rollout.temperature
    output = output_loss(config.loss.output, heads, topology, temperature=temperature, with_metrics=with_metrics)
    return TracedModels(inputs, student, teachers, output, fp8_copies)


def _model_inputs(run: PlannedRun, live: LiveBytes) -> ModelInputs:
    traced, student = without_device_features(run), run.setup.student
    teachers = list(run.setup.teachers.values())
    bridge: dict[LayerPair, PairBridge] = {}
    if run.bridge_rank is not None:
        rank, width = run.bridge_rank, teachers[0].spec.hidden_size
        with live.making("weights"):
            maps = PairBridge(torch.empty(rank, student.hidden_size), torch.empty(rank, width), torch.empty(width))
        bridge = dict.fromkeys(run.setup.layer_plan.pairs, maps)
    vocab_size = min(student.vocab_size, *(teacher.spec.vocab_size for teacher in teachers))
    return ModelInputs(traced.config, traced.setup, bridge, vocab_size, run.config.data.own_teacher_prompts)


def _count_weights(teacher: Teacher, config: Config, micro_batch: DeviceBatch, live: LiveBytes) -> Teacher:
    """Return the teacher with its weights, and those of its base, counted whenever they are loaded.

    FP8 weights have their size on a GPU.
    """

    def counted(load_weights: Callable[[], Stage]) -> Callable[[], Stage]:
        def load() -> Stage:
            with live.making("teacher_weights"):
                stage = load_weights()
            for weight in fp8_candidates(stage, config, sum(teacher.plan.teacher_stages)):
                live.resize(weight, weight.numel() * linear_bytes(config, teacher=True))
            announce_rows(stage, _rows_per_stage(micro_batch, teacher.topology))
            return stage

        if config.teachers_in_memory == "all":
            load()
        return load

    base = teacher.base
    if base is not None:
        base = dataclasses.replace(base, load=counted(base.load))
    return dataclasses.replace(teacher, load=counted(teacher.load), base=base)


def _rows_per_stage(micro_batch: DeviceBatch, topology: Topology) -> int:
    return micro_batch.num_tokens // (topology.tensor_size if topology.sequence_parallel else 1)
