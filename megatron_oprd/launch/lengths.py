"""Check that prompts and rollouts fit into micro-batches and into the positions of the models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oprd.config import Config, teacher_section
from megatron_oprd.data.packing import num_tokens
from megatron_oprd.launch.setup import Setup
from megatron_oprd.model_spec import LongRope, ModelSpec, YarnScaling
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.rollout.horizon import longest_response
from megatron_oprd.training.global_batch import teacher_view
from megatron_oprd.types import Prompt, Rollout, UserError


@dataclass(frozen=True)
class Lengths:
    """The longest sequence of a run, in tokens."""

    sequence: int  # prompt and response, for the student or a teacher
    response: int
    generated: int = 0  # prompt and response that the student generates; 0: stored responses


def longest_prompt(prompts: Sequence[Prompt]) -> int:
    """Return the tokens of the longest prompt, the teachers' own prompts included."""
    return max(max(len(prompt.prompt_ids), len(prompt.teacher_prompt_ids or ())) for prompt in prompts)


def longest_row(config: Config, student: ModelSpec, prompts: Sequence[Prompt]) -> int:
    """Return the most tokens of a prompt and its generated answer."""
    longest = max(len(prompt.prompt_ids) for prompt in prompts) + longest_response(config)
    return min(longest, student.max_position_embeddings)


def check_room(config: Config, student: ModelSpec, prompts: Sequence[Prompt]) -> None:
    """Raise UserError if a prompt leaves the student no position for an answer."""
    longest, room = max(len(prompt.prompt_ids) for prompt in prompts), student.max_position_embeddings - 1
    if longest > room:
        raise UserError(
            f"the longest prompt has {longest} tokens and leaves no room for an answer: student.path="
            f"{config.student.path} has {_positions(student)}; lower data.max_prompt_tokens to {room}"
        )


def check_lengths(
    config: Config,
    student: ModelSpec,
    teachers: Mapping[str, PlannedTeacher],
    prompts: Sequence[Prompt],
    *,
    other_tokenizer: bool = False,
) -> None:
    """Raise UserError if a prompt with the longest answer is too long for a micro-batch or for a teacher.

    With `other_tokenizer`, the single teacher has another tokenizer than the student. Its tokens of an answer are then
    cut to its room, so that only a prompt without any room for an answer is an error.
    """
    most = longest_response(config)
    limit = f"rollout.max_new_tokens={most}"
    if most < config.rollout.max_new_tokens:
        limit = f"the {most} tokens of rollout.horizon"
    longest = max(len(prompt.prompt_ids) for prompt in prompts) if other_tokenizer else longest_prompt(prompts)
    needed = longest + most
    if needed > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"prompt with {limit} ({needed} tokens); raise it to {needed} or lower "
            "rollout.max_new_tokens"
        )
    if other_tokenizer:
        (teacher,) = teachers.values()
        longest, room = max(len(prompt.teacher_prompt_ids or ()) for prompt in prompts), teacher_room(config, teacher)
        if longest >= room:
            raise UserError(
                f"the teacher's longest prompt has {longest} tokens and leaves no room for an answer: "
                f"{_reads(config, teacher)}; lower data.max_prompt_tokens to {room - 1}"
            )
        return
    for name, teacher in teachers.items():
        own = [prompt for prompt in prompts if name in ("", prompt.data_source)]
        lengths = [len(prompt.teacher_prompt_ids or prompt.prompt_ids) for prompt in own]
        answers = [min(most, student.max_position_embeddings - len(prompt.prompt_ids)) for prompt in own]
        needed = max(map(sum, zip(lengths, answers, strict=True)), default=0)
        positions = teacher.spec.max_position_embeddings
        if needed > positions:
            room = positions - max(lengths)
            works = f"rollout.max_new_tokens to {room}" if room > 0 else f"data.max_prompt_tokens below {positions}"
            raise UserError(
                f"{teacher_section(name)}.path={teacher.config.path} has {_positions(teacher.spec)}, and its longest "
                f"prompt with {limit} needs {needed}; lower {works}"
            )


def answer_limits(config: Config, setup: Setup, prompts: Sequence[Prompt], most: int) -> list[int]:
    """Return the most tokens of an answer to each prompt: `most`, or what a micro-batch and every model have room for.

    A prompt without any room has 0 or less.
    """
    specs = [setup.student, *(teacher.spec for teacher in setup.teachers.values())]
    room = min(config.batch.max_tokens_per_micro_batch, *(spec.max_position_embeddings for spec in specs))
    return [min(most, room - max(len(one.prompt_ids), len(one.teacher_prompt_ids or ()))) for one in prompts]


def check_rotary_factors(
    config: Config, student: ModelSpec, teachers: Mapping[str, PlannedTeacher], prompts: Sequence[Prompt]
) -> None:
    """Raise UserError if `rollout.horizon: auto` would change the rotary factors of a model with LongRoPE.

    The factors of a sequence, at all its positions, depend on its length. A response that the horizon cuts must be on
    the same side of `original_positions` as the complete response can be.
    """
    if config.rollout.horizon != "auto":
        return
    cut, most = longest_response(config), config.rollout.max_new_tokens
    models = [("student", config.student.path, student, [len(prompt.prompt_ids) for prompt in prompts])]
    for name, teacher in teachers.items():
        own = [prompt for prompt in prompts if name in ("", prompt.data_source)]
        lengths = [len(prompt.teacher_prompt_ids or prompt.prompt_ids) for prompt in own]
        models.append((teacher_section(name), teacher.config.path, teacher.spec, lengths))
    for section, path, spec, lengths in models:
        if not isinstance(spec.rope_scaling, LongRope):
            continue
        original = spec.rope_scaling.original_positions
        crossing = sum(length + cut <= original < length + most for length in lengths)
        if crossing:
            raise UserError(
                f"rollout.horizon=auto would change the loss: {section}.path={path} has other rotary factors above "
                f"{original} positions (LongRoPE), which {crossing} prompts reach with rollout.max_new_tokens={most} "
                f"and not with {cut} tokens; lower rollout.max_new_tokens to {cut} or use rollout.horizon=null"
            )


def check_replayed_lengths(
    config: Config,
    student: ModelSpec,
    teachers: Mapping[str, PlannedTeacher],
    rollouts: Sequence[Rollout],
    *,
    other_tokenizer: bool = False,
) -> None:
    """Raise UserError if a rollout has more tokens than the student or its teacher has positions.

    With `other_tokenizer` (see `check_lengths`), a rollout whose prompt leaves the teacher no room is an error.
    """
    for rollout in rollouts:
        line = f"{config.rollout.path}, line {rollout.prompt_index + 1}"
        name = rollout.data_source if config.teachers else ""
        readers = [("student", config.student.path, student, rollout)]
        if not other_tokenizer:
            teacher = teachers[name]
            readers += [(teacher_section(name), teacher.config.path, teacher.spec, teacher_view(rollout))]
        elif len(rollout.teacher_prompt_ids or ()) >= teacher_room(config, teachers[name]):
            raise UserError(
                f"{line}: teacher_prompt_ids has {len(rollout.teacher_prompt_ids or ())} tokens and leaves no room for "
                f"an answer: {_reads(config, teachers[name])}; shorten it or leave the rollout out"
            )
        for section, path, spec, read in readers:
            if num_tokens(read) > spec.max_position_embeddings:
                raise UserError(
                    f"{line}: {num_tokens(read)} tokens, but {section}.path={path} has {_positions(spec)}; shorten the "
                    "rollout or leave it out"
                )


def teacher_room(config: Config, teacher: PlannedTeacher) -> int:
    """Return the most tokens of a rollout, prompt and answer, for a teacher with another tokenizer.

    The limits are the teacher's positions and the size of a micro-batch.
    """
    return min(teacher.spec.max_position_embeddings, config.batch.max_tokens_per_micro_batch)


def _reads(config: Config, teacher: PlannedTeacher) -> str:
    return (
        f"teacher.path={teacher.config.path} has {_positions(teacher.spec)}, and a micro-batch holds "
        f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch}"
    )


def _positions(spec: ModelSpec) -> str:
    scaled = isinstance(spec.rope_scaling, YarnScaling)
    return f"{spec.max_position_embeddings} positions (max_position_embeddings{' under YaRN' if scaled else ''})"
