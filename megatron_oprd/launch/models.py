"""Build the models of a run on this rank: student, teachers and LM heads. A dry run builds them without weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_oprd.checkpoint.weights import load_lm_head, load_weights
from megatron_oprd.config import Config, OutputConfig, ParallelConfig
from megatron_oprd.launch.setup import Setup
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import DTYPES, ModelPart, build_model
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import BaseHead, Heads, OutputLoss
from megatron_oprd.models.precision import ModelPrecision
from megatron_oprd.models.projection import student_maps, teacher_maps
from megatron_oprd.models.scaled_linear import quantize_weights
from megatron_oprd.models.state_map import StateMap, make_maps
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.parallel.topology import Topology, build_topology, collective_timeout, start_process
from megatron_oprd.runtime import platform, start_profile
from megatron_oprd.training.student import Student, build_student
from megatron_oprd.training.teacher import Base, FrozenModel, Teacher, build_frozen
from megatron_oprd.training.teacher_average import TeacherAverage
from megatron_oprd.types import LayerPair, PairBridge


@dataclass(frozen=True)
class ModelInputs:
    """The inputs from which the models of a run are built."""

    config: Config
    setup: Setup
    bridge: Mapping[LayerPair, PairBridge]  # the maps of the bridge; empty without a bridge
    vocab_size: int  # number of token ids that all models with the student's tokenizer have
    own_teacher_prompts: bool  # True if a teacher may have other tokens than the student


class WeightSource(Protocol):
    """The source of the weights of a model."""

    def fill(self, stage: Stage, folder: str, spec: ModelSpec, topology: Topology) -> None:
        """Fill the parameters of a stage. Collective over the world."""

    def lm_head(self, folder: str, spec: ModelSpec, start: int, end: int) -> torch.Tensor:
        """Return rows `start` to `end` [rows, hidden] of the LM head. No communication."""


class ModelFolders:
    """Weights from model folders."""

    def fill(self, stage: Stage, folder: str, spec: ModelSpec, topology: Topology) -> None:
        with start_profile.phase("read weights"):
            load_weights(stage, folder, spec, topology)

    def lm_head(self, folder: str, spec: ModelSpec, start: int, end: int) -> torch.Tensor:
        return load_lm_head(folder, spec, start, end)


class NoWeights:
    """No weights: parameters stay as they are built, for example without memory."""

    def fill(self, stage: Stage, folder: str, spec: ModelSpec, topology: Topology) -> None:
        return None

    def lm_head(self, folder: str, spec: ModelSpec, start: int, end: int) -> torch.Tensor:
        return torch.empty(end - start, spec.hidden_size)


MODEL_FOLDERS = ModelFolders()


@dataclass(frozen=True)
class Topologies:
    """The layouts of the models of a run."""

    student: Topology
    teachers: tuple[Topology, ...]  # in the order of the configuration; the student's object if a teacher shares it


def start_topologies(config: Config, setup: Setup) -> Topologies:
    """Join the process group and make the process groups of every layout. The student's layout is then in force.

    Collective over the world.
    """
    layouts = [teacher.layout for teacher in setup.teachers.values()]
    distinct: list[tuple[ParallelConfig, Topology]] = []
    for layout in layouts:
        if layout is not None and all(layout != known for known, _ in distinct):
            distinct.append((layout, start_topology(config, layout)))
    student = start_topology(config, config.parallel)  # the last layout stays in force
    teachers = (next((own for known, own in distinct if known == layout), student) for layout in layouts)
    return Topologies(student, tuple(teachers))


def start_topology(config: Config, parallel: ParallelConfig) -> Topology:
    """Join the process group, make the process groups of a layout and put it in force. Collective over the world."""
    device = platform.choose_device(config.train.device)
    timeout_seconds = collective_timeout(config.watchdog)
    start_process(device, timeout_seconds)
    return build_topology(parallel, device, config.train.seed, timeout_seconds)


def build_student_stage(
    config: Config, setup: Setup, topology: Topology, weights: WeightSource = MODEL_FOLDERS
) -> Stage:
    """Return this rank's chunks of the student, with weights. Collective over the world."""
    stage = build_model(
        setup.student,
        topology,
        DTYPES[config.precision.dtype],
        ModelPart(setup.student_stages),
        recompute=config.recompute,
        precision=setup.precision.student,
    )
    weights.fill(stage, config.student.path, setup.student, topology)
    return stage


def build_trained_student(inputs: ModelInputs, stage: Stage, topology: Topology) -> Student:
    """Wrap the student's chunks for training: optimizer, schedule, and the maps of its hidden states.

    Collective over the world.
    """
    config, plan = inputs.config, inputs.setup.layer_plan
    representation = config.loss.representation
    maps: Mapping[int, StateMap] = student_maps(inputs.bridge, topology.device, trained=representation.train_bridge)
    if representation.has_map:
        layers = [layer for layer in plan.student_layers if plan.student_stage(layer) in topology.stages]
        widths = inputs.setup.student.hidden_size, inputs.setup.widest_teacher
        maps = make_maps(representation.map, layers, widths, config.train.seed, topology.device)
    return build_student(stage, config, plan, topology, maps)


def build_teachers(
    inputs: ModelInputs, topologies: Topologies, weights: WeightSource = MODEL_FOLDERS
) -> tuple[Teacher, ...]:
    """Return the teachers, in the order of the configuration. Collective over the world."""
    planned = inputs.setup.teachers.values()
    return tuple(
        build_teacher(inputs, teacher, topology, weights)
        for teacher, topology in zip(planned, topologies.teachers, strict=True)
    )


def build_teacher(
    inputs: ModelInputs, teacher: PlannedTeacher, topology: Topology, weights: WeightSource = MODEL_FOLDERS
) -> Teacher:
    """Return a frozen teacher up to its highest compared layer. Collective over the world.

    With `teachers_in_memory: one`, the model and its base are built anew for each pass.
    """
    config, precision = inputs.config, inputs.setup.precision.teacher

    def loader(folder: str) -> FrozenModel:
        def load(precision: ModelPrecision) -> Stage:
            stage = build_frozen(teacher, topology, DTYPES[config.precision.dtype], precision)
            with topology.active():
                weights.fill(stage, folder, teacher.spec, topology)
                if precision.scaled_weights:
                    quantize_weights(stage, precision.keep_bf16)
            stage.eval().requires_grad_(False)
            return stage

        return FrozenModel(load, precision, stays=config.teachers_in_memory == "all")

    base = teacher.config.base if teacher.config.extrapolates else None
    return Teacher(
        loader(teacher.config.path),
        topology,
        teacher.plan,
        inputs.setup.widest_teacher,
        inputs.setup.widest_final_states,
        own_prompts=inputs.own_teacher_prompts,
        offload=teacher.config.offload_targets,
        base=None
        if base is None
        else Base(
            loader(base.path), base.extrapolate, teacher.config.extrapolates_layers, teacher.config.extrapolates_output
        ),
        maps=teacher_maps(inputs.bridge, topology.device),
    )


def build_answering_teacher(
    config: Config, setup: Setup, teacher: PlannedTeacher, topology: Topology, weights: WeightSource = MODEL_FOLDERS
) -> Stage:
    """Return this rank's chunks of a whole teacher, with LM head and without FP8, for generation.

    `topology` is the teacher's layout. Collective over the world.
    """
    with topology.active(), torch.no_grad():
        dtype, precision = DTYPES[config.precision.dtype], setup.precision.exact_teacher
        stage = build_model(teacher.spec, topology, dtype, precision=precision)
        weights.fill(stage, teacher.config.path, teacher.spec, topology)
    stage.eval().requires_grad_(False)
    return stage


def load_heads(
    inputs: ModelInputs, stage: Stage, topology: Topology, weights: WeightSource = MODEL_FOLDERS
) -> Heads | None:
    """Return the LM heads of student and teachers on the ranks of the student's last stage, None on other ranks.

    Collective over the world.
    """

    def load() -> Heads | None:
        if topology.num_stages - 1 not in topology.stages:
            return None
        head = stage[-1].lm_head
        first = topology.tensor_rank * len(head)
        end = max(min(first + len(head), inputs.vocab_size), first)

        def rows(folder: str, teacher: PlannedTeacher) -> torch.Tensor:
            return weights.lm_head(folder, teacher.spec, first, end).to(topology.device, head.dtype)

        teachers = list(inputs.setup.teachers.values())
        bases = {
            number: BaseHead(rows(teacher.config.base.path, teacher), teacher.config.base.extrapolate)
            for number, teacher in enumerate(teachers)
            if teacher.config.base is not None and teacher.config.extrapolates_output
        }
        return Heads(head, tuple(rows(teacher.config.path, teacher) for teacher in teachers), first, bases)

    return on_every_rank(load)


def follow_student(inputs: ModelInputs, student: Student, teachers: Sequence[Teacher], heads: Heads | None) -> Student:
    """Return the student with the average of its weights that the teacher follows (`teacher.ema`), if one does.

    No communication.
    """
    (config, *_), (teacher, *_) = inputs.config.named_teachers.values(), teachers
    if not config.follows_student:
        return student
    assert config.ema is not None
    average = TeacherAverage(student.stage, student.optimizer, teacher.load(), heads, config.ema)
    return dataclasses.replace(student, average=average)


def output_loss(
    config: OutputConfig, heads: Heads | None, topology: Topology, *, temperature: float, with_metrics: bool
) -> OutputLoss | None:
    """Return the output-space objective of one step if this rank has `heads`, otherwise None."""
    if heads is None:
        return None
    return OutputLoss(config, heads, topology, temperature=temperature, with_metrics=with_metrics)
