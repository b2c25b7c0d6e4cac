"""Build this rank's part of a run from checked inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_oprd.bridge.origin import check_bridge_weights
from megatron_oprd.checkpoint.training_state import CheckpointContent
from megatron_oprd.checkpoint.weights import content_hash, load_lm_head, load_weights
from megatron_oprd.config import Config, ParallelConfig
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.setup import Setup
from megatron_oprd.models.build import DTYPES, ModelPart, build_model
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.models.projection import StudentMap, identify, student_maps, teacher_maps
from megatron_oprd.models.scaled_linear import quantize_weights
from megatron_oprd.models.tp_overlap import start_tp_overlap
from megatron_oprd.parallel.rank_zero import on_every_rank, on_rank_zero
from megatron_oprd.parallel.topology import Topology, build_topology, collective_timeout, start_process
from megatron_oprd.rollout.batch_rows import rows_at_a_time
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import RolloutEngine, evaluation_sampling, rollout_sampling
from megatron_oprd.rollout.replay import ReplayEngine
from megatron_oprd.runtime import platform
from megatron_oprd.training.state import Identity
from megatron_oprd.training.student import Student, build_student
from megatron_oprd.training.teacher import Teacher, build_frozen
from megatron_oprd.types import ModelSpec

EVALUATION_SEED = 1_000_003  # added to train.seed: every evaluation draws the same numbers, other ones than training


@dataclass(frozen=True)
class Models:
    """This rank's part of student and teachers with their weights, and the engine that generates with the student."""

    topology: Topology  # the student's layout, which is active
    stage: Stage  # the student's chunks on this rank
    teachers: tuple[Teacher, ...]  # in the order of the configuration
    engine: RolloutEngine


@dataclass(frozen=True)
class Run:
    """This rank's part of a training run."""

    inputs: Inputs
    models: Models
    student: Student  # the chunks of `models.stage` with their optimizer
    heads: Heads | None  # the LM heads of an output-space objective, on the student's last stage
    evaluator: RolloutEngine | None  # None: training does not evaluate
    identities: dict[str, Identity]  # of the teachers, by data_source; a checkpoint stores them

    @property
    def topology(self) -> Topology:
        """Return the student's layout."""
        return self.models.topology

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Return the teachers in the order of the configuration."""
        return self.models.teachers

    @property
    def engine(self) -> RolloutEngine:
        """Return the engine that makes the rollouts of training."""
        return self.models.engine

    @property
    def checkpoint_content(self) -> CheckpointContent:
        """Return the parts of this run that a checkpoint stores or checks."""
        source = self.inputs.config.student.path
        return CheckpointContent(self.student, self.inputs.setup.student, self.topology, self.identities, source)

    def output_loss(self, *, with_metrics: bool) -> OutputLoss | None:
        """Return the output-space objective of one step on the student's last stage; otherwise None."""
        if self.heads is None:
            return None
        config = self.inputs.config
        temperature = config.rollout.temperature
        return OutputLoss(
            config.loss.output, self.heads, self.topology, temperature=temperature, with_metrics=with_metrics
        )


def build_run(inputs: Inputs) -> Run:
    """Start the process group and build this rank's part of every model. Collective over the world."""
    config, setup, models = inputs.config, inputs.setup, build_models(inputs)
    topology, stage, plan = models.topology, models.stage, setup.layer_plan
    evaluator = None
    if inputs.evaluation_prompts is not None:
        evaluator = make_evaluator(config, stage, setup.student, topology)
    return Run(
        inputs,
        models,
        build_student(stage, config, plan, topology, _student_maps(inputs, topology)),
        load_heads(inputs, stage, topology) if plan.output else None,
        evaluator,
        {name: _identity(inputs, teacher) for name, teacher in setup.teachers.items()},
    )


def build_models(inputs: Inputs) -> Models:
    """Start the process group and load this rank's part of student and teachers. Collective over the world."""
    config, setup = inputs.config, inputs.setup
    planned = list(setup.teachers.values())
    own_topologies = [
        (layout, start_topology(config, layout)) for layout in _distinct([teacher.layout for teacher in planned])
    ]
    topology = start_topology(config, config.parallel)  # the last layout stays active
    if config.parallel.tp_comm_overlap:
        tokens = setup.precision.pad_tokens * topology.tensor_size
        start_tp_overlap(config.parallel, config.precision, tokens=tokens, hidden_size=setup.student.hidden_size)
    on_rank_zero(partial(_check_bridge, inputs))
    stage = load_student(config, setup, topology)
    teachers = []
    for teacher in planned:
        own = next((own for layout, own in own_topologies if layout == teacher.layout), topology)
        teachers.append(build_teacher(inputs, teacher, own))
    return Models(topology, stage, tuple(teachers), _engine(inputs, stage, topology))


def _check_bridge(inputs: Inputs) -> None:
    """Raise UserError if the bridge was fitted on other weights. Reads all weights: call it on one rank."""
    if inputs.bridge is not None and inputs.bridge_origin is not None:
        check_bridge_weights(inputs.bridge, inputs.config, inputs.bridge_origin)


def _distinct(layouts: list[ParallelConfig | None]) -> list[ParallelConfig]:
    found: list[ParallelConfig] = []
    for layout in layouts:
        if layout is not None and layout not in found:
            found.append(layout)
    return found


def _identity(inputs: Inputs, teacher: PlannedTeacher) -> Identity:
    digest = on_rank_zero(lambda: content_hash(teacher.config.path))
    pairs = tuple((pair.student, pair.teacher) for pair in teacher.plan.pairs)
    return Identity(teacher.config.path, digest, pairs, identify(inputs.bridge.maps) if inputs.bridge else None)


def _student_maps(inputs: Inputs, topology: Topology) -> dict[int, StudentMap]:
    if inputs.bridge is None:
        return {}
    trained = inputs.config.loss.representation.train_bridge
    return student_maps(inputs.bridge.maps, topology.device, trained=trained)


def start_topology(config: Config, parallel: ParallelConfig) -> Topology:
    """Join the process group, create Megatron's groups for a layout and activate it. Collective over the world."""
    device = platform.choose_device(config.train.device)
    timeout_seconds = collective_timeout(config.watchdog)
    start_process(device, timeout_seconds)
    return build_topology(parallel, device, config.train.seed, timeout_seconds)


def build_teacher(inputs: Inputs, teacher: PlannedTeacher, topology: Topology) -> Teacher:
    """Build a frozen teacher up to its highest compared layer. Collective over the world.

    With `teachers_in_memory: one` the weights are loaded for each teacher pass; otherwise they are loaded here.
    """
    config, precision = inputs.config, inputs.setup.precision.teacher

    def load() -> Stage:
        stage = build_frozen(teacher, topology, DTYPES[config.precision.dtype], precision)
        with topology.active():
            load_weights(stage, teacher.config.path, teacher.spec, topology)
            if precision.scaled_weights:
                quantize_weights(stage, precision.keep_bf16)
        stage.eval().requires_grad_(False)
        return stage

    kept = load() if config.teachers_in_memory == "all" else None
    return Teacher(
        load if kept is None else lambda: kept,
        topology,
        teacher.plan,
        inputs.setup.widest_teacher,
        own_prompts=inputs.own_teacher_prompts,
        offload=teacher.config.offload_targets,
        maps=teacher_maps(inputs.bridge.maps, topology.device) if inputs.bridge else {},
    )


def load_heads(inputs: Inputs, stage: Stage, topology: Topology) -> Heads | None:
    """Return the LM heads of student and teachers on ranks of the student's last stage, None on other ranks.

    Collective over the world.
    """

    def read() -> Heads | None:
        if topology.num_stages - 1 not in topology.stages:
            return None
        head = stage[-1].lm_head
        first = topology.tensor_rank * len(head)
        end = max(min(first + len(head), inputs.vocab_size), first)
        teachers = (load_lm_head(t.config.path, t.spec, first, end) for t in inputs.setup.teachers.values())
        return Heads(head, tuple(rows.to(topology.device, head.dtype) for rows in teachers), first)

    return on_every_rank(read)


def load_student(config: Config, setup: Setup, topology: Topology) -> Stage:
    """Return this rank's chunks of the student with their weights. Collective over the world."""
    stage = build_model(
        setup.student,
        topology,
        DTYPES[config.precision.dtype],
        ModelPart(setup.student_stages),
        recompute=config.recompute,
        precision=setup.precision.student,
    )
    load_weights(stage, config.student.path, setup.student, topology)
    return stage


def make_evaluator(config: Config, stage: Stage, spec: ModelSpec, topology: Topology) -> EmbeddedEngine:
    """Return the engine that samples evaluation answers from the student."""
    seed, sampling = config.train.seed + EVALUATION_SEED, evaluation_sampling(config.evaluation)
    rows = rows_at_a_time(spec, topology, stage, config.data.max_prompt_tokens + sampling.max_new_tokens)
    return EmbeddedEngine(stage, spec, topology, sampling, seed=seed, max_batch=rows)


def _engine(inputs: Inputs, stage: Stage, topology: Topology) -> RolloutEngine:
    config = inputs.config
    if config.rollout.engine == "replay":
        per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        return ReplayEngine(
            inputs.replayed, per_step, replica_rank=topology.replica_rank, num_replicas=topology.num_replicas
        )
    sampling = rollout_sampling(config.rollout)
    rows = rows_at_a_time(
        inputs.setup.student, topology, stage, config.data.max_prompt_tokens + sampling.max_new_tokens
    )
    return EmbeddedEngine(
        stage,
        inputs.setup.student,
        topology,
        sampling,
        seed=config.train.seed,
        max_batch=rows,
        vocab_size=inputs.vocab_size,
        progress=topology.rank == 0,
    )
