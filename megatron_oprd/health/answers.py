"""The start model's own answers, which the health watch measures again and again while the student learns.

`watch.py` calls this file: once at step 0 to make the answers, and in a resumed run to load them from
`health/answers.jsonl` in the run folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.prompts import PromptState, take
from megatron_oprd.data.sharding import split
from megatron_oprd.evaluation.grading import grade
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.launch.lengths import answer_limits
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.batch_rows import rows_at_a_time
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.replay import load_replay, replay_record
from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import Prompt, Rollout, UserError

ENOUGH_RIGHT = 8  # with this many right answers, or a quarter of all, only the right answers are kept


@dataclasses.dataclass(frozen=True)
class AnswerCounts:
    """The numbers of the start model's answers, written beside the check at step 0."""

    answers: int
    graded: int  # answers to prompts with a ground truth
    right: int | None  # None: no answer is graded
    filtered: bool  # True if only the right answers are kept


def answers_file(run_dir: Path) -> Path:
    """Return the path of the kept answers, in the format of a replay file."""
    return run_dir / "health" / "answers.jsonl"


def load_answers(run_dir: Path, vocab_size: int) -> tuple[Rollout, ...]:
    """Return the answers that the start model left in a run folder. No communication."""
    return tuple(load_replay(answers_file(run_dir), vocab_size))


def choose_prompts(inputs: Inputs) -> tuple[list[Prompt], list[int]]:
    """Return `health.prompts` prompts for the start model, and the most tokens that each answer may have.

    The prompts come from `evaluation.data` if the run evaluates, otherwise from the last prompts that training takes,
    or from the last prompts of a replay file. An answer must fit into a micro-batch and into every model.
    No communication. Raises UserError if no prompt leaves room for an answer.
    """
    config = inputs.config
    if inputs.prompts is None and inputs.evaluation_prompts is None:
        prompts = _replayed_prompts(inputs.replayed)
    else:
        prompt_set = inputs.evaluation_prompts or inputs.prompts
        assert prompt_set is not None
        shuffle = prompt_set is inputs.evaluation_prompts or config.data.shuffle
        prompts = prompt_set.prompts
        prompts, _ = take(prompts, PromptState(), len(prompts), seed=config.train.seed, shuffle=shuffle)
    limits = answer_limits(config, inputs.setup, prompts, config.health.max_new_tokens)
    chosen = [pair for pair in zip(prompts, limits, strict=True) if pair[1] > 0][-config.health.prompts :]
    if not chosen:
        raise UserError(
            f"health.every={config.health.every}: no prompt leaves room for an answer in batch.max_tokens_per_micro_"
            f"batch={config.batch.max_tokens_per_micro_batch} tokens and the positions of the models; raise it or set "
            "health.every=0"
        )
    return [prompt for prompt, _ in chosen], [limit for _, limit in chosen]


def generate_answers(
    inputs: Inputs, stage: Stage, topology: Topology, prompts: Sequence[Prompt], limits: Sequence[int]
) -> list[Rollout]:
    """Generate the student's greedy answers.

    Args:
        stage: this rank's chunks of the student.
        limits: the most tokens of the answer to each prompt.

    Returns: the answers in the order of the prompts, on every rank. Collective over the world.
    """
    longest = max(len(prompt.prompt_ids) + limit for prompt, limit in zip(prompts, limits, strict=True))
    engine = EmbeddedEngine(
        stage,
        inputs.setup.student,
        topology,
        Sampling(temperature=0.0, max_new_tokens=inputs.config.health.max_new_tokens),
        seed=inputs.config.train.seed,
        max_batch=rows_at_a_time(inputs.setup.student, topology, stage, longest),
        vocab_size=inputs.vocab_size,
    )
    local_prompts = split(prompts, topology.replica_rank, topology.num_replicas)
    local_limits = split(limits, topology.replica_rank, topology.num_replicas)
    answers = share_rollouts(engine.generate(local_prompts, 0, local_limits), topology)
    if inputs.aligner is None:
        return answers
    # The prompts of a teacher with another tokenizer are no token ids of the student.
    return [dataclasses.replace(answer, teacher_prompt_ids=None) for answer in answers]


def keep_answers(
    run_dir: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    answers: Sequence[Rollout],
) -> tuple[list[Rollout], AnswerCounts]:
    """Select the answers to measure from now on and write them to the run folder.

    If enough answers are right, only these are kept: learning makes wrong answers improbable, which is no sign of a
    collapse. One rank calls this. Raises UserError when the disk does not accept the file.
    """
    graded, right = [], []
    if tokenizer is not None:
        graded = [number for number, prompt in enumerate(prompts) if prompt.ground_truth is not None]
        right = [number for number in graded if grade(prompts[number], answers[number], tokenizer).correct]
    filtered = len(right) >= min(ENOUGH_RIGHT, len(answers) / 4)
    kept = right if filtered else range(len(answers))
    path = answers_file(run_dir)
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(_replay_line(answers[number], prompts[number]) + "\n" for number in kept))
    counts = AnswerCounts(len(answers), len(graded), len(right) if graded else None, filtered)
    return [answers[number] for number in kept], counts


def _replayed_prompts(rollouts: Sequence[Rollout]) -> list[Prompt]:
    """Return the prompts of the rollouts, each once."""
    distinct = {(rollout.prompt_ids, rollout.teacher_prompt_ids): rollout for rollout in rollouts}
    return [
        Prompt(number, r.prompt_ids, data_source=r.data_source, teacher_prompt_ids=r.teacher_prompt_ids)
        for number, r in enumerate(distinct.values())
    ]


def _replay_line(answer: Rollout, prompt: Prompt) -> str:
    truth = {} if prompt.ground_truth is None else {"ground_truth": prompt.ground_truth}
    return json.dumps(replay_record(answer) | truth)
