"""Whether prompts and rollouts fit into micro-batches and into the positions that the models know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oprd.config import Config, teacher_section
from megatron_oprd.data.packing import num_tokens
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.training.global_batch import teacher_view
from megatron_oprd.types import ModelSpec, Prompt, Rollout, UserError


@dataclass(frozen=True)
class Lengths:
    """The most tokens that a sequence, prompt and response, and that a response alone can have."""

    sequence: int
    response: int


def longest_prompt(prompts: Sequence[Prompt]) -> int:
    """Tokens of the longest prompt that student or teacher reads."""
    return max(max(len(prompt.prompt_ids), len(prompt.teacher_prompt_ids or ())) for prompt in prompts)


def check_room(config: Config, student: ModelSpec, prompts: Sequence[Prompt]) -> None:
    """Raise UserError for a prompt after which the student has no position left for an answer."""
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
    """Raise UserError when a prompt of the student's or a teacher's, with the longest answer, is too long for a
    micro-batch or for the teacher. `other_tokenizer`: of the only teacher, whose reading of an answer is cut where it
    has no more room; then a prompt of its own that leaves none."""
    most = config.rollout.max_new_tokens
    longest = max(len(prompt.prompt_ids) for prompt in prompts) if other_tokenizer else longest_prompt(prompts)
    asked = longest + most
    if asked > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"prompt with rollout.max_new_tokens={most} ({asked} tokens); raise it to {asked} or lower "
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
        asked = max(map(sum, zip(lengths, answers, strict=True)), default=0)
        positions = teacher.spec.max_position_embeddings
        if asked > positions:
            room = positions - max(lengths)
            works = f"rollout.max_new_tokens to {room}" if room > 0 else f"data.max_prompt_tokens below {positions}"
            raise UserError(
                f"{teacher_section(name)}.path={teacher.config.path} has {_positions(teacher.spec)}, and its longest "
                f"prompt with rollout.max_new_tokens={most} needs {asked}; lower {works}"
            )


def check_replayed_lengths(
    config: Config,
    student: ModelSpec,
    teachers: Mapping[str, PlannedTeacher],
    rollouts: Sequence[Rollout],
    *,
    other_tokenizer: bool = False,
) -> None:
    """Raise UserError for a rollout with more tokens than the student, or the teacher that reads it, has positions; of
    a teacher with another tokenizer, for one whose prompt leaves no room for an answer."""
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
    """The most tokens, prompt and answer, that a teacher with another tokenizer reads of a rollout: as many as it has
    positions and as a micro-batch holds."""
    return min(teacher.spec.max_position_embeddings, config.batch.max_tokens_per_micro_batch)


def _reads(config: Config, teacher: PlannedTeacher) -> str:
    return (
        f"teacher.path={teacher.config.path} has {_positions(teacher.spec)}, and a micro-batch holds "
        f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch}"
    )


def _positions(spec: ModelSpec) -> str:
    return f"{spec.max_position_embeddings} positions (max_position_embeddings)"
