"""What the user brought, read and checked. What can be known to be wrong is found here, before a model is built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd import platform
from megatron_oprd.config import Config
from megatron_oprd.data.prompts import PromptSet, load_prompts
from megatron_oprd.data.tokenizer import check_tokenizer, load_tokenizer, same_vocabulary
from megatron_oprd.files import check_writable
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.layouts import plan_layers, world_size
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.models.weights import check_weights
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.rollout.replay import check_enough, load_replay
from megatron_oprd.types import ModelSpec, Rollout, UserError


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


def read_inputs(config: Config) -> Inputs:
    """Read and check everything but the weights themselves. Raises UserError, one line, for the first thing wrong."""
    platform.choose_device(config.train.device)
    check_writable(config.train.run_dir)
    check_layout(config.parallel, world_size())
    student, teacher = read_model_spec(config.student.path), read_model_spec(config.teacher.path)
    plan = plan_layers(config, student, teacher)
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
