"""What the user brought, read and checked. What can be known to be wrong is found here, before a model is built."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.bridge.origin import expected_origin, load_bridge
from megatron_oprd.bridge.record import Bridge, Origin
from megatron_oprd.checkpoint.weights import check_weights
from megatron_oprd.config import MAKE_A_BRIDGE, Config, teacher_section
from megatron_oprd.data.alignment import Aligner, align_rollouts, end_of_turn_id, make_aligner
from megatron_oprd.data.packing import num_tokens
from megatron_oprd.data.prompts import PromptSet, PromptState, load_prompts, take
from megatron_oprd.data.tokenizer import check_tokenizer, has_tokenizer, load_tokenizer, same_vocabulary, tokenizer_hash
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.layouts import check_optimizer, check_precision, plan_teacher, planned_world
from megatron_oprd.launch.lengths import (
    Lengths,
    check_lengths,
    check_replayed_lengths,
    check_room,
    longest_prompt,
    teacher_room,
)
from megatron_oprd.launch.missing_inputs import MissingInputs, find_missing, longest_prompts
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.models.precision import Precision, plan_precision
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.rollout.replay import check_enough, load_replay
from megatron_oprd.runtime import platform
from megatron_oprd.runtime.environment import Machine, find_machine
from megatron_oprd.runtime.files import check_writable
from megatron_oprd.training.global_batch import GlobalBatch, longest_reading
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
    aligner: Aligner | None = None  # for a teacher with another tokenizer, the only one; None: all read the same ids
    bridge: Bridge | None = None  # None: states are compared as they are
    bridge_origin: Origin | None = None  # models, tokenizers and positions that the bridge must be fitted for
    precision: Precision = field(default_factory=Precision)
    world: int = 1  # processes of the run
    missing: MissingInputs = field(default_factory=MissingInputs)  # what a dry run did without

    @property
    def plan(self) -> LayerPlan:
        """The student's layers that are compared, the same with every teacher, and the first teacher's."""
        return next(iter(self.teachers.values())).plan

    @property
    def vocab_size(self) -> int:
        """Token ids that all models know which read them, as a teacher with another tokenizer does not. (Models of one
        tokenizer pad their vocabularies to different sizes.)"""
        if self.aligner is not None:
            return self.student.vocab_size
        return min(self.student.vocab_size, *(teacher.spec.vocab_size for teacher in self.teachers.values()))

    @property
    def widest_teacher(self) -> int:
        """The largest hidden size of the teachers."""
        return max(teacher.spec.hidden_size for teacher in self.teachers.values())

    @property
    def own_prompts(self) -> bool:
        """Whether teachers may read other prompts than the student."""
        replayed = any(rollout.teacher_prompt_ids is not None for rollout in self.replayed)
        return self.config.data.own_teacher_prompts or self.aligner is not None or replayed

    @property
    def bridge_rank(self) -> int | None:
        """r of the bridge; None without one."""
        planned = self.config.bridge.ranks[0] if self.missing.bridge else None
        return self.bridge.rank if self.bridge else planned

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

    def take_prompts(self, position: PromptState) -> tuple[list[Prompt], PromptState]:
        """The prompts of a step and the position after them; none when rollouts are replayed."""
        if self.prompts is None:
            return [], position
        count, seed, shuffle = self.config.rollout.prompts_per_step, self.config.train.seed, self.config.data.shuffle
        return take(self.prompts.prompts, position, count, seed=seed, shuffle=shuffle)

    def global_batch(self, rollouts: Sequence[Rollout]) -> GlobalBatch:
        """The rollouts of a step, taught each by the teacher of its data_source, where there are several."""
        names = list(self.teachers)
        numbers = (names.index(rollout.data_source) if len(names) > 1 else 0 for rollout in rollouts)
        config = self.config
        return GlobalBatch(
            tuple(rollouts), tuple(numbers), config.loss, config.batch, self.student, self.precision.pad_tokens
        )

    def aligned(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The rollouts with what a teacher with another tokenizer reads of them; else as they are. No communication."""
        if self.aligner is None:
            return list(rollouts)
        (teacher,) = self.teachers.values()
        return align_rollouts(self.aligner, rollouts, teacher_room(self.config, teacher))


def read_inputs(config: Config, *, fitting: bool = False, dry_run: bool = False) -> Inputs:
    """Read and check everything but the weights themselves. Raises UserError, one line, for the first thing wrong.
    `fitting`: for making the bridge between its models. `dry_run`: for telling what would run, of which all but the
    models' config.json may be yet to come."""
    platform.choose_device(config.train.device)
    check_writable(config.train.run_dir)
    world = planned_world(config.parallel, dry_run=dry_run)
    check_layout(config.parallel, world)
    precision, planned_for = _plan_precision(config, fitting=fitting, dry_run=dry_run)
    student = read_model_spec(config.student.path)
    specs = {name: read_model_spec(teacher.path) for name, teacher in config.named_teachers.items()}
    teachers = {name: plan_teacher(config, student, spec, name, world) for name, spec in specs.items()}
    check_precision(config, precision, student, teachers)
    missing = find_missing(config, planned_for) if dry_run else MissingInputs()
    models = [(config.student.path, student), *((teacher.config.path, teacher.spec) for teacher in teachers.values())]
    for path, spec in models:
        if path not in missing.weights:
            check_weights(path, spec)
    tokenizer = other = aligner = prompts = evaluation_prompts = None
    with_bridge = fitting or (config.loss.reads_layers and config.loss.representation.bridge is not None)
    if not missing.tokenizers and (
        config.rollout.engine == "megatron"
        or config.evaluation.every
        or (with_bridge and any(has_tokenizer(path) for path, _ in models))
    ):
        tokenizer, other = _tokenizers(config, student, teachers, with_bridge=with_bridge)
    if tokenizer is not None and other is not None:
        end = end_of_turn_id(other, config.data.teacher_kwargs)
        aligner = make_aligner(tokenizer, other, student_eos_ids=student.eos_token_ids, teacher_end_of_turn_id=end)
    replayed = _replayed(config, student, teachers, aligner) if config.rollout.engine == "replay" else []
    if (missing.tokenizers or missing.prompts) and config.rollout.engine == "megatron":
        prompts = longest_prompts(config)
    elif tokenizer is not None and config.rollout.engine == "megatron":
        prompts = load_prompts(config.data.prompts, tokenizer, config.data, teacher_tokenizer=other)
    if tokenizer is not None and config.evaluation.every and not missing.prompts:
        evaluation_prompts = read_evaluation_prompts(config, tokenizer)
    _check_sources(config, prompts.prompts if prompts else replayed)
    for asked in filter(None, (prompts, evaluation_prompts)):
        check_room(config, student, asked.prompts)
    if prompts is not None:
        check_lengths(config, student, teachers, prompts.prompts, other_tokenizer=other is not None)
    check_replayed_lengths(config, student, teachers, replayed, other_tokenizer=other is not None)
    origin = _bridge_origin(config, student, teachers, tokenizer, other) if with_bridge else None
    bridge = None
    if origin is not None and not fitting and not missing.bridge:
        bridge = load_bridge(config, next(iter(teachers.values())).plan.pairs, origin)
    return Inputs(
        config,
        student,
        teachers,
        tokenizer,
        prompts,
        evaluation_prompts,
        replayed,
        aligner,
        bridge,
        origin,
        precision,
        world=world,
        missing=missing,
    )


def _plan_precision(config: Config, *, fitting: bool, dry_run: bool) -> tuple[Precision, str | None]:
    """How this run computes, and in a dry run what it computes on where this machine could not: the device that the
    recipes are for."""

    def on(machine: Machine) -> Precision:
        if not fitting:
            check_optimizer(config, machine)
        return plan_precision(config.precision, config.parallel, machine)

    machine = find_machine()
    try:
        return on(machine), None
    except UserError:
        if not dry_run or machine.capability is not None or config.train.device == "cpu":
            raise
    return on(Machine("2.11.0", (9, 0), (13, 0))), "an H100 with Transformer Engine 2.11"


def _bridge_origin(
    config: Config,
    student: ModelSpec,
    teachers: dict[str, PlannedTeacher],
    tokenizer: PreTrainedTokenizerBase | None,
    other: PreTrainedTokenizerBase | None,
) -> Origin:
    """Return the origin that a bridge of this run must have. Raises UserError for several teachers."""
    if config.teachers:
        raise UserError("loss.representation.bridge joins the student with one teacher; name it as teacher.path")
    (teacher,) = teachers.values()
    of_student, of_teacher = (None if one is None else tokenizer_hash(one) for one in (tokenizer, other))
    return expected_origin(config, student, teacher, (of_student, of_student if other is None else of_teacher))


def read_evaluation_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of `evaluation.data`. Raises UserError when none are named."""
    if not config.evaluation.data:
        raise UserError("evaluation.data: name at least one prompt file with answers to evaluate on")
    # No teacher reads these.
    data = config.data.model_copy(update={"teacher_prompt_key": None, "teacher_chat_template_kwargs": None})
    return load_prompts(config.evaluation.data, tokenizer, data)


def _tokenizers(
    config: Config, student: ModelSpec, teachers: dict[str, PlannedTeacher], *, with_bridge: bool
) -> tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase | None]:
    """The student's tokenizer, and the teacher's where it is another one: without it the teachers read the student's
    token ids, which must mean the same to them."""
    tokenizer, other = load_tokenizer(config.student.path), None
    check_tokenizer(tokenizer, student)
    for name, teacher in teachers.items():
        path = teacher.config.path
        model = f"{teacher_section(name)}.path={path}"
        own = load_tokenizer(path) if has_tokenizer(path) or with_bridge else tokenizer
        if own is not tokenizer and not same_vocabulary(tokenizer, own):
            _check_another_tokenizer(config, model, with_bridge=with_bridge)
            other = own
        check_tokenizer(tokenizer if other is None else other, teacher.spec, model)
    return tokenizer, other


def _check_another_tokenizer(config: Config, teacher: str, *, with_bridge: bool) -> None:
    """Raise UserError where a teacher with another tokenizer than the student's cannot take part."""
    differ = f"the tokenizers of student.path={config.student.path} and {teacher} give the same text other ids"
    if config.teachers:
        raise UserError(
            f"{differ}; use teachers with the student's tokenizer: a bridge joins a single one (teacher.path)"
        )
    if config.loss.reads_output:
        raise UserError(
            f"{differ}, so loss.output.objective={config.loss.output.objective} has no distributions to compare; use "
            "none, with a bridge, or a teacher with the student's tokenizer"
        )
    if not with_bridge:
        raise UserError(
            f"{differ}; use a teacher with the student's tokenizer, or {MAKE_A_BRIDGE} and name it in "
            "loss.representation.bridge"
        )


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


def _replayed(
    config: Config, student: ModelSpec, teachers: dict[str, PlannedTeacher], aligner: Aligner | None
) -> list[Rollout]:
    rollout, of_teachers = config.rollout, [teacher.spec.vocab_size for teacher in teachers.values()]
    assert rollout.path is not None  # the configuration requires it
    if aligner is None:
        rollouts = load_replay(rollout.path, min(student.vocab_size, *of_teachers))
    else:
        rollouts = load_replay(rollout.path, student.vocab_size, teacher_vocab_size=of_teachers[0])
    check_enough(rollouts, config.train.steps, rollout.prompts_per_step * rollout.samples_per_prompt)
    # What a teacher with another tokenizer has no room for is cut.
    longest = max(map(longest_reading if aligner is None else num_tokens, rollouts), default=0)
    if longest > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"rollout of {rollout.path} ({longest} tokens)"
        )
    return rollouts
