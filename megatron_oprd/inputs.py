"""What the user brought, read and checked. What can be known to be wrong is found here, before a model is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd import platform
from megatron_oprd.config import Config, teacher_section
from megatron_oprd.data.prompts import PromptSet, load_prompts
from megatron_oprd.data.tokenizer import check_tokenizer, load_tokenizer, same_vocabulary
from megatron_oprd.files import check_writable
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.layouts import plan_teacher, world_size
from megatron_oprd.lengths import check_lengths, check_replayed_lengths, check_room, longest_prompt
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.models.weights import check_weights
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.rollout.replay import check_enough, load_replay
from megatron_oprd.training.global_batch import longest_reading
from megatron_oprd.training.predict import Lengths
from megatron_oprd.types import ModelSpec, Prompt, Rollout, UserError


@dataclass(frozen=True)
class Inputs:
    """What the user brought, read and checked; no model is built and no process has spoken to another yet."""

    config: Config
    student: ModelSpec
    teachers: dict[str, PlannedTeacher]  # by the data_source that they teach; a single one teaches all, without a name
    tokenizer: PreTrainedTokenizerBase | None  # None: replayed rollouts need none
    prompts: PromptSet | None
    evaluation_prompts: PromptSet | None
    replayed: list[Rollout]

    @property
    def plan(self) -> LayerPlan:
        """The student's layers that are compared, the same with every teacher, and the first teacher's."""
        return next(iter(self.teachers.values())).plan

    @property
    def vocab_size(self) -> int:
        """Token ids that all models know. (Models of one tokenizer pad their vocabularies to different sizes.)"""
        return min(self.student.vocab_size, *(teacher.spec.vocab_size for teacher in self.teachers.values()))

    @property
    def widest_teacher(self) -> int:
        """The largest hidden size of the teachers."""
        return max(teacher.spec.hidden_size for teacher in self.teachers.values())

    @property
    def own_prompts(self) -> bool:
        """Whether teachers may read other prompts than the student."""
        replayed = any(rollout.teacher_prompt_ids is not None for rollout in self.replayed)
        return self.config.data.teacher_prompt_key is not None or replayed

    @property
    def lengths(self) -> Lengths:
        """How long a sequence of this run can be, and a response in it."""
        if self.prompts is None:
            responses = (len(rollout.response_ids) for rollout in self.replayed)
            return Lengths(max(map(longest_reading, self.replayed), default=1), max(responses, default=1))
        response = self.config.rollout.max_new_tokens
        longest = longest_prompt(self.prompts.prompts) + response
        return Lengths(min(longest, self.student.max_position_embeddings), response)

    @property
    def run_dir(self) -> Path:
        return Path(self.config.train.run_dir)


def read_inputs(config: Config) -> Inputs:
    """Read and check everything but the weights themselves. Raises UserError, one line, for the first thing wrong."""
    platform.choose_device(config.train.device)
    check_writable(config.train.run_dir)
    check_layout(config.parallel, world_size())
    student = read_model_spec(config.student.path)
    specs = {name: read_model_spec(teacher.path) for name, teacher in config.named_teachers.items()}
    teachers = {name: plan_teacher(config, student, spec, name) for name, spec in specs.items()}
    check_weights(config.student.path, student)
    for teacher in teachers.values():
        check_weights(teacher.config.path, teacher.spec)
    vocab_size = min(student.vocab_size, *(spec.vocab_size for spec in specs.values()))
    replayed = _replayed(config, vocab_size) if config.rollout.engine == "replay" else []
    tokenizer = prompts = evaluation_prompts = None
    if config.rollout.engine == "megatron" or config.evaluation.every:
        tokenizer = _tokenizer(config, student, teachers)
    if tokenizer is not None and config.rollout.engine == "megatron":
        prompts = load_prompts(config.data.prompts, tokenizer, config.data)
    if tokenizer is not None and config.evaluation.every:
        evaluation_prompts = read_evaluation_prompts(config, tokenizer)
    _check_sources(config, prompts.prompts if prompts else replayed)
    for asked in filter(None, (prompts, evaluation_prompts)):
        check_room(config, student, asked.prompts)
    if prompts is not None:
        check_lengths(config, student, teachers, prompts.prompts)
    check_replayed_lengths(config, student, teachers, replayed)
    return Inputs(config, student, teachers, tokenizer, prompts, evaluation_prompts, replayed)


def read_evaluation_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of `evaluation.data`. Raises UserError when none are named."""
    if not config.evaluation.data:
        raise UserError("evaluation.data: name at least one prompt file with answers to evaluate on")
    data = config.data.model_copy(update={"teacher_prompt_key": None})  # no teacher reads these
    return load_prompts(config.evaluation.data, tokenizer, data)


def _tokenizer(config: Config, student: ModelSpec, teachers: dict[str, PlannedTeacher]) -> PreTrainedTokenizerBase:
    """The student's tokenizer. The teachers read the student's token ids, so they must mean the same to them."""
    tokenizer = load_tokenizer(config.student.path)
    check_tokenizer(tokenizer, student)
    for name, teacher in teachers.items():
        path = teacher.config.path
        key = f"{teacher_section(name)}.path"
        check_tokenizer(tokenizer, teacher.spec, f"{key}={path}")
        has_own = any((Path(path) / file).exists() for file in ("tokenizer.json", "tokenizer_config.json"))
        if has_own and not same_vocabulary(tokenizer, load_tokenizer(path)):
            raise UserError(
                f"the tokenizers of student.path={config.student.path} and {key}={path} give the same text other ids; "
                "use a teacher with the student's tokenizer"
            )
    return tokenizer


def _check_sources(config: Config, taught: Sequence[Prompt] | Sequence[Rollout]) -> None:
    """Raise UserError when several teachers leave out the data_source of what they are to teach."""
    if not config.teachers:
        return
    sources = Counter(one.data_source for one in taught)
    known = f"teachers has {', '.join(config.teachers)}"
    for source, number in sources.items():
        if not source:  # of rollouts alone: prompts without one have the name of their file
            raise UserError(
                f"{number} rollouts of {config.rollout.path} have no data_source to say who teaches; {known}"
            )
        if source not in config.teachers:
            what = "prompts" if config.rollout.engine == "megatron" else "rollouts"
            raise UserError(f"data_source {source!r} of {number} {what} has no teacher; {known}")


def _replayed(config: Config, vocab_size: int) -> list[Rollout]:
    rollout = config.rollout
    assert rollout.path is not None  # the configuration requires it
    rollouts = load_replay(rollout.path, vocab_size=vocab_size)
    check_enough(rollouts, config.train.steps, rollout.prompts_per_step * rollout.samples_per_prompt)
    longest = max(map(longest_reading, rollouts), default=0)
    if longest > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"rollout of {rollout.path} ({longest} tokens)"
        )
    return rollouts
