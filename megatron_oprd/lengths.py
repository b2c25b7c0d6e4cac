"""Whether prompts and rollouts fit into micro-batches and into the positions that the models know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_oprd.config import Config, teacher_section
from megatron_oprd.data.packing import num_tokens
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.training.global_batch import as_the_teacher_reads
from megatron_oprd.types import ModelSpec, Prompt, Rollout, UserError


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
    config: Config, student: ModelSpec, teachers: Mapping[str, PlannedTeacher], prompts: Sequence[Prompt]
) -> None:
    """Raise UserError when a prompt of the student's or a teacher's, with the longest answer, is too long for a
    micro-batch or for the teacher."""
    most = config.rollout.max_new_tokens
    asked = longest_prompt(prompts) + most
    if asked > config.batch.max_tokens_per_micro_batch:
        raise UserError(
            f"batch.max_tokens_per_micro_batch={config.batch.max_tokens_per_micro_batch} does not hold the longest "
            f"prompt with rollout.max_new_tokens={most} ({asked} tokens); raise it to {asked} or lower "
            "rollout.max_new_tokens"
        )
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
    config: Config, student: ModelSpec, teachers: Mapping[str, PlannedTeacher], rollouts: Sequence[Rollout]
) -> None:
    """Raise UserError for a rollout with more tokens than the student, or the teacher that reads it, has positions."""
    for rollout in rollouts:
        name = rollout.data_source if config.teachers else ""
        readers = (
            ("student", config.student.path, student, rollout),
            (teacher_section(name), teachers[name].config.path, teachers[name].spec, as_the_teacher_reads(rollout)),
        )
        for section, path, spec, read in readers:
            if num_tokens(read) > spec.max_position_embeddings:
                raise UserError(
                    f"{config.rollout.path}, line {rollout.prompt_index + 1}: {num_tokens(read)} tokens, but "
                    f"{section}.path={path} has {_positions(spec)}; shorten the rollout or leave it out"
                )


def _positions(spec: ModelSpec) -> str:
    return f"{spec.max_position_embeddings} positions (max_position_embeddings)"
