"""From a configuration to what a run consists of. What can be known to be wrong is found before a model is built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd import platform
from megatron_oprd.config import Config, EvaluationConfig, RolloutConfig
from megatron_oprd.data.prompts import PromptSet, load_prompts
from megatron_oprd.data.tokenizer import check_tokenizer, load_tokenizer, same_vocabulary
from megatron_oprd.files import check_writable
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import DTYPES, build_model, check_divisible, check_recompute
from megatron_oprd.models.layer_plan import LayerPlan, make_plan
from megatron_oprd.models.model import HiddenStateModel
from megatron_oprd.models.weights import check_weights, content_hash, load_weights
from megatron_oprd.parallel.collectives import min_over
from megatron_oprd.parallel.together import on_rank_zero
from megatron_oprd.parallel.topology import Topology, build_topology, check_layout, start_process
from megatron_oprd.rollout.engine import RolloutEngine, Sampling
from megatron_oprd.rollout.megatron import MegatronEngine
from megatron_oprd.rollout.replay import ReplayEngine, check_enough, load_replay
from megatron_oprd.training.state import Identity
from megatron_oprd.training.student import Student, build_student
from megatron_oprd.types import ModelSpec, Rollout, UserError

MOST_ROWS = 256  # generated at once; more do not make a step cheaper
EVALUATION_SEED = 1_000_003  # added to train.seed: evaluation draws other numbers than training, always the same ones


@dataclass(frozen=True)
class Inputs:
    """What the user brought, read and checked; no model is built and no process has spoken to another yet."""

    config: Config
    student: ModelSpec
    teacher: ModelSpec
    plan: LayerPlan
    tokenizer: PreTrainedTokenizerBase | None  # None: replayed rollouts need none
    prompts: PromptSet | None
    evaluation_prompts: PromptSet | None
    replayed: list[Rollout]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.train.run_dir)


@dataclass(frozen=True)
class Run:
    """Everything that `train.fit` needs, on this rank."""

    inputs: Inputs
    topology: Topology
    student: Student
    teacher: HiddenStateModel
    engine: RolloutEngine
    evaluator: RolloutEngine | None
    identity: Identity


def read_inputs(config: Config) -> Inputs:
    """Read and check everything but the weights themselves. Raises UserError, one line, for the first thing wrong."""
    platform.choose_device(config.train.device)
    check_writable(config.train.run_dir)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(config.parallel, world_size)
    if config.teacher.parallel is not None:
        raise UserError("teacher.parallel: a teacher in a layout of its own is not supported yet; leave it null")
    student, teacher = read_model_spec(config.student.path), read_model_spec(config.teacher.path)
    plan = make_plan(config.loss.representation, student, teacher, config.parallel.pipeline)
    for spec in (student, teacher):
        check_divisible(spec, config.parallel.tensor)
    check_recompute(config.recompute, plan.student_stages)
    for path, spec in ((config.student.path, student), (config.teacher.path, teacher)):
        check_weights(path, spec)
    replayed = _replayed(config, student, teacher) if config.rollout.engine == "replay" else []
    tokenizer = prompts = evaluation_prompts = None
    if config.rollout.engine == "megatron" or config.evaluation.every:
        tokenizer = _tokenizer(config, student, teacher)
    if tokenizer is not None and config.rollout.engine == "megatron":
        prompts = load_prompts(config.data.prompts, tokenizer, config.data)
        _check_lengths(config, prompts)
    if tokenizer is not None and config.evaluation.every:
        evaluation_prompts = read_evaluation_prompts(config, tokenizer)
    return Inputs(config, student, teacher, plan, tokenizer, prompts, evaluation_prompts, replayed)


def read_evaluation_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of `evaluation.data`. Raises UserError when none are named."""
    if not config.evaluation.data:
        raise UserError("evaluation.data: name at least one prompt file with answers to evaluate on")
    return load_prompts(config.evaluation.data, tokenizer, config.data)


def build_run(inputs: Inputs) -> Run:
    """Start the process group and build this rank's part of every model. Collective over the world."""
    config, plan = inputs.config, inputs.plan
    topology = start_topology(config)
    model = build_and_load(config, inputs.student, topology, plan.student_stages)
    dtype = DTYPES[config.precision.dtype]
    teacher = build_model(
        inputs.teacher,
        topology,
        dtype,
        stages=plan.teacher_stages,
        lm_head=False,
        final_norm=plan.teacher_normed_layer is not None,
    )
    load_weights(teacher, config.teacher.path, inputs.teacher, topology)
    teacher.eval().requires_grad_(False)
    teacher_hash = on_rank_zero(lambda: content_hash(config.teacher.path))
    pairs = tuple((pair.student, pair.teacher) for pair in plan.pairs)
    evaluator = None
    if inputs.evaluation_prompts is not None:
        evaluator = make_evaluator(config, model, inputs.student, topology)
    return Run(
        inputs,
        topology,
        build_student(model, config, plan),
        teacher,
        _engine(inputs, model, topology),
        evaluator,
        Identity(config.teacher.path, teacher_hash, pairs),
    )


def start_topology(config: Config) -> Topology:
    """Join the process group and make Megatron's groups for the student's layout. Collective over the world."""
    device = platform.choose_device(config.train.device)
    start_process(device)
    return build_topology(config.parallel, device, config.train.seed)


def build_and_load(config: Config, spec: ModelSpec, topology: Topology, stages: tuple[int, ...]) -> HiddenStateModel:
    """This rank's stage of the student with its weights. Collective over the world."""
    model = build_model(spec, topology, DTYPES[config.precision.dtype], stages=stages, recompute=config.recompute)
    load_weights(model, config.student.path, spec, topology)
    return model


def make_evaluator(config: Config, model: HiddenStateModel, spec: ModelSpec, topology: Topology) -> MegatronEngine:
    """The engine that samples evaluation answers from the student."""
    seed, sampling = config.train.seed + EVALUATION_SEED, sampling_of(config.evaluation)
    rows = rows_at_a_time(spec, topology, model, config.data.max_prompt_tokens + sampling.max_new_tokens)
    return MegatronEngine(model, spec, topology, sampling, seed=seed, max_batch=rows)


def rows_at_a_time(
    spec: ModelSpec, topology: Topology, model: HiddenStateModel, longest_row: int, most: int = MOST_ROWS
) -> int:
    """How many rollouts of up to `longest_row` tokens are generated at once: their keys and values fill at most a third
    of the memory that is free now. The same on every rank of a replica; communicates over its groups."""
    parameter = next(model.parameters())
    blocks, heads = len(model.decoder.layers), spec.num_query_groups // topology.tensor_size
    row_bytes = 2 * max(blocks, 1) * heads * spec.head_dim * parameter.element_size()
    row_bytes *= min(longest_row, spec.max_position_embeddings)
    rows: float = max(1, min(most, platform.free_memory_bytes(topology.device) // 3 // row_bytes))
    for group in (topology.groups.tp, topology.groups.pp):
        (rows,) = min_over([rows], group, topology.device)
    return int(rows)


def sampling_of(config: RolloutConfig | EvaluationConfig) -> Sampling:
    """How a section of the configuration wants its tokens drawn."""
    rollout = isinstance(config, RolloutConfig)
    return Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k if rollout else 0,
        max_new_tokens=config.max_new_tokens,
        samples_per_prompt=config.samples_per_prompt if rollout else config.samples,
    )


def _engine(inputs: Inputs, model: HiddenStateModel, topology: Topology) -> RolloutEngine:
    config = inputs.config
    if config.rollout.engine == "replay":
        per_step = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
        return ReplayEngine(inputs.replayed, per_step, data_rank=topology.data_rank, data_size=topology.data_size)
    sampling = sampling_of(config.rollout)
    rows = rows_at_a_time(inputs.student, topology, model, config.data.max_prompt_tokens + sampling.max_new_tokens)
    return MegatronEngine(
        model,
        inputs.student,
        topology,
        sampling,
        seed=config.train.seed,
        max_batch=rows,
        progress=topology.rank == 0,
    )


def _tokenizer(config: Config, student: ModelSpec, teacher: ModelSpec) -> PreTrainedTokenizerBase:
    """The student's tokenizer. The teacher reads the student's token ids, so they must mean the same to it."""
    tokenizer = load_tokenizer(config.student.path)
    for spec in (student, teacher):
        check_tokenizer(tokenizer, spec)
    has_own = any((Path(config.teacher.path) / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    if has_own and not same_vocabulary(tokenizer, load_tokenizer(config.teacher.path)):
        raise UserError(
            f"the tokenizers of student.path={config.student.path} and teacher.path={config.teacher.path} give the "
            "same text other ids; use a teacher with the student's tokenizer"
        )
    return tokenizer


def _check_lengths(config: Config, prompts: PromptSet) -> None:
    longest = max(len(prompt.prompt_ids) for prompt in prompts.prompts) + config.rollout.max_new_tokens
    if longest > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"prompt with rollout.max_new_tokens={config.rollout.max_new_tokens} ({longest} tokens); raise it to "
            f"{longest} or lower rollout.max_new_tokens"
        )


def _replayed(config: Config, student: ModelSpec, teacher: ModelSpec) -> list[Rollout]:
    rollout = config.rollout
    assert rollout.path is not None  # the configuration requires it
    vocab_size = min(student.vocab_size, teacher.vocab_size)
    rollouts = load_replay(rollout.path, vocab_size=vocab_size)
    check_enough(rollouts, config.train.steps, rollout.prompts_per_step * rollout.samples_per_prompt)
    longest = max((len(r.prompt_ids) + len(r.response_ids) for r in rollouts), default=0)
    if longest > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"rollout of {rollout.path} ({longest} tokens)"
        )
    return rollouts
