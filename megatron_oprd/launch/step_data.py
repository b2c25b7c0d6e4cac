"""The data of a training step: its prompts, its aligned rollouts and its global batch. No communication."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.data.alignment import align_rollouts
from megatron_oprd.data.prompts import PromptState, take, take_of_one_source
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.lengths import teacher_room
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.types import Prompt, Rollout


def next_prompts(inputs: Inputs, position: PromptState) -> tuple[list[Prompt], PromptState]:
    """Return the prompts of the next step and the position after them. No prompts if rollouts are replayed."""
    if inputs.prompts is None:
        return [], position
    config = inputs.config
    count, seed, shuffle = config.rollout.prompts_per_step, config.train.seed, config.data.shuffle
    take_some = take_of_one_source if config.data.group_by_teacher else take
    return take_some(inputs.prompts.prompts, position, count, seed=seed, shuffle=shuffle)


def align(inputs: Inputs, rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Add to each rollout the tokens of a teacher with another tokenizer, cut to the teacher's room.

    Returns the rollouts unchanged if student and teachers share a tokenizer.
    """
    if inputs.aligner is None:
        return list(rollouts)
    (teacher,) = inputs.setup.teachers.values()
    return align_rollouts(inputs.aligner, rollouts, teacher_room(inputs.config, teacher))


def make_global_batch(inputs: Inputs, rollouts: Sequence[Rollout], step: int | None = None) -> GlobalBatch:
    """Return the global batch of a step from the rollouts of all replicas.

    With several teachers, a rollout belongs to the teacher of its `data_source`. `step` is the number of updates so
    far, from which `loss.schedule` computes the weights; None: the weights without a schedule.
    """
    names = list(inputs.setup.teachers)
    teachers = (names.index(rollout.data_source) if len(names) > 1 else 0 for rollout in rollouts)
    config, setup = inputs.config, inputs.setup
    loss = config.loss if step is None else config.loss.at(step)
    return GlobalBatch(tuple(rollouts), tuple(teachers), loss, config.batch, setup.student, setup.precision.pad_tokens)
