"""Build this rank's part of a run from checked inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_oprd.bridge.origin import check_bridge_weights
from megatron_oprd.checkpoint.training_state import CheckpointContent
from megatron_oprd.checkpoint.weights import WeightHashes
from megatron_oprd.config import Config
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.models import (
    Topologies,
    build_student_stage,
    build_teachers,
    build_trained_student,
    follow_student,
    load_heads,
    output_loss,
    start_topologies,
)
from megatron_oprd.launch.rollout_servers import build_vllm_engine, check_servers, start_servers
from megatron_oprd.launch.step_data import next_prompts
from megatron_oprd.launch.teacher_answers import EVALUATION_SEED, AnswerRequest, teacher_answers
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.models.projection import identify
from megatron_oprd.models.tp_overlap import start_tp_overlap
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.batch_rows import rows_at_a_time
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import RolloutEngine, evaluation_sampling, rollout_sampling
from megatron_oprd.rollout.horizon import HorizonEngine, longest_response, response_limit
from megatron_oprd.rollout.replay import ReplayEngine
from megatron_oprd.runtime import start_profile
from megatron_oprd.training.ahead import RolloutSource
from megatron_oprd.training.state import Identity
from megatron_oprd.training.student import Student
from megatron_oprd.training.teacher import Teacher
from megatron_oprd.types import Rollout


@dataclass(frozen=True)
class Models:
    """This rank's part of student and teachers with their weights, and the engine that generates with the student."""

    topology: Topology  # the student's layout, which is active
    stage: Stage  # the student's chunks on this rank
    teachers: tuple[Teacher, ...]  # in the order of the configuration
    engine: RolloutEngine
    hashes: WeightHashes  # of the model folders, on rank 0
    teacher_answers: tuple[Rollout, ...] = ()  # to the evaluation prompts; empty: evaluations measure none


@dataclass(frozen=True)
class Run:
    """This rank's part of a training run."""

    inputs: Inputs
    models: Models
    student: Student  # the chunks of `models.stage` with their optimizer
    heads: Heads | None  # the LM heads of an output-space objective, on the student's last stage
    evaluator: RolloutEngine | None  # None: no evaluation samples answers of the student
    identities: dict[str, Identity]  # of the teachers, by data_source; a checkpoint stores them
    student_hash: str  # of the student's first weights, for checkpoints; empty if nothing was hashed

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
    def rollouts(self) -> RolloutSource:
        """Return the source of the rollouts of each training step."""
        inputs, config = self.inputs, self.inputs.config
        take_prompts = partial(next_prompts, inputs)
        return RolloutSource(self.engine, take_prompts, self.topology, config.rollout.ahead, config.train.steps)

    @property
    def checkpoint_content(self) -> CheckpointContent:
        """Return the parts of this run that a checkpoint stores or checks."""
        spec, config = self.inputs.setup.student, self.inputs.config.student
        return CheckpointContent(
            self.student, spec, self.topology, self.identities, config.model_files, config.path, self.student_hash
        )

    def output_loss(self, step: int, *, with_metrics: bool) -> OutputLoss | None:
        """Return the output-space objective of the update after `step` updates on the student's last stage.

        Returns None on other stages, and if the step has no such objective.
        """
        config = self.inputs.config
        loss = config.loss.at(step)
        heads = self.heads if loss.reads_output else None
        return output_loss(
            loss.output, heads, self.topology, temperature=config.rollout.temperature, with_metrics=with_metrics
        )


def build_run(inputs: Inputs, *, identifies: bool = True) -> Run:
    """Start the process group and build this rank's part of every model. Collective over the world.

    `identifies` hashes the weights of all models, which only a run that saves checkpoints needs.
    """
    config, setup = inputs.config, inputs.setup
    models = build_models(inputs, evaluates=True, identifies=identifies)
    topology, stage = models.topology, models.stage
    start_profile.enter("rollout engine")
    evaluator = None
    if inputs.evaluation_prompts is not None and config.evaluation.samples:
        evaluator = make_evaluator(config, stage, setup.student, topology)
    start_profile.enter("optimizer")
    student = build_trained_student(inputs.model_inputs, stage, topology)
    start_profile.enter("read weights")
    heads = load_heads(inputs.model_inputs, stage, topology) if setup.layer_plan.output else None
    student = follow_student(inputs.model_inputs, student, models.teachers, heads)
    start_profile.enter("hash weights (the wait for it)")
    teachers = setup.teachers.items() if identifies else ()
    return Run(
        inputs,
        models,
        student,
        heads,
        evaluator,
        {name: _identity(inputs, teacher, models.hashes) for name, teacher in teachers},
        on_rank_zero(lambda: models.hashes.of(config.student.path)) if identifies else "",
    )


def build_models(inputs: Inputs, *, evaluates: bool = False, identifies: bool = True) -> Models:
    """Start the process group and load this rank's part of student and teachers. Collective over the world.

    Args:
        evaluates: let the teacher answer the evaluation prompts first, if the inputs ask for that.
        identifies: hash the weights of all models. Without hashes, only a bridge is checked against the weights.
    """
    config, setup = inputs.config, inputs.setup
    start_profile.enter("process groups")
    topologies = start_topologies(config, setup)
    topology = topologies.student
    if config.parallel.tp_comm_overlap:
        tokens = setup.precision.pad_tokens * topology.tensor_size
        start_tp_overlap(config.parallel, config.precision, tokens=tokens, hidden_size=setup.student.hidden_size)
    folders = [config.student.path, *setup.teacher_folders]
    hashed = topology.rank == 0 and (identifies or inputs.bridge is not None)
    hashes = WeightHashes(folders if hashed else ())
    start_profile.enter("hash weights (the wait for it)")
    on_rank_zero(partial(_check_bridge, inputs, hashes))
    server_keeper = check_servers(inputs)
    # The teacher answers before the models of the run, and a server that the run starts, take memory.
    start_profile.enter("teacher's answers")
    answers = _teacher_answers(inputs, topologies, hashes) if evaluates and inputs.teacher_answers else ()
    start_profile.enter("build modules")
    servers = start_servers(inputs, server_keeper)
    stage = build_student_stage(config, setup, topology)
    teachers = build_teachers(inputs.model_inputs, topologies)
    start_profile.enter("rollout engine")
    if servers is None:
        engine = _engine(inputs, stage, topology)
    else:
        engine = build_vllm_engine(inputs, servers, stage, topology)
    return Models(topology, stage, teachers, _with_horizon(inputs, engine), hashes, answers)


def _teacher_answers(inputs: Inputs, topologies: Topologies, hashes: WeightHashes) -> tuple[Rollout, ...]:
    """Return the answers of the single teacher to the evaluation prompts."""
    # `inputs.teacher_answers` is True only with both.
    assert inputs.evaluation_prompts is not None and inputs.tokenizer is not None
    prompts, (teacher,) = inputs.evaluation_prompts.prompts, inputs.setup.teachers.values()
    digest = on_rank_zero(lambda: hashes.of(teacher.config.path))
    request = AnswerRequest(inputs.config, inputs.setup, inputs.tokenizer, prompts, inputs.vocab_size, digest)
    return teacher_answers(request, topologies.teachers[0])


def _check_bridge(inputs: Inputs, hashes: WeightHashes) -> None:
    """Raise UserError if the bridge was fitted on other weights. Waits for `hashes`: call it on rank 0."""
    if inputs.bridge is not None and inputs.bridge_origin is not None:
        check_bridge_weights(inputs.bridge, inputs.config, inputs.bridge_origin, hashes)


def _identity(inputs: Inputs, teacher: PlannedTeacher, hashes: WeightHashes) -> Identity:
    digest = on_rank_zero(lambda: hashes.of(teacher.config.path))
    pairs = tuple((pair.student, pair.teacher) for pair in teacher.plan.pairs)
    bridge = identify(inputs.bridge.maps) if inputs.bridge else None
    ema = teacher.config.ema if teacher.config.follows_student else None
    base = teacher.config.base
    if base is None or not teacher.config.extrapolates:
        return Identity(teacher.config.path, digest, pairs, bridge, ema=ema)
    of_base = on_rank_zero(lambda: hashes.of(base.path))
    space = "" if base.space == "representation" else f" {base.space}"
    return Identity(teacher.config.path, digest, pairs, bridge, f"{base.extrapolate} {of_base}{space}", ema)


def make_evaluator(config: Config, stage: Stage, spec: ModelSpec, topology: Topology) -> EmbeddedEngine:
    """Return the engine that samples evaluation answers from the student."""
    seed, sampling = config.train.seed + EVALUATION_SEED, evaluation_sampling(config)
    rows = rows_at_a_time(spec, topology, stage, config.data.max_prompt_tokens + sampling.max_new_tokens)
    return EmbeddedEngine(stage, spec, topology, sampling, seed=seed, max_batch=rows)


def _with_horizon(inputs: Inputs, engine: RolloutEngine) -> RolloutEngine:
    config = inputs.config
    if config.rollout.horizon is None:
        return engine
    positions = inputs.setup.student.max_position_embeddings
    return HorizonEngine(engine, partial(response_limit, config), config.rollout.max_new_tokens, positions)


def _engine(inputs: Inputs, stage: Stage, topology: Topology) -> RolloutEngine:
    config = inputs.config
    if config.rollout.engine == "replay":
        per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        return ReplayEngine(
            inputs.replayed, per_step, replica_rank=topology.replica_rank, num_replicas=topology.num_replicas
        )
    sampling = rollout_sampling(config.rollout)
    rows = rows_at_a_time(
        inputs.setup.student, topology, stage, config.data.max_prompt_tokens + longest_response(config)
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
