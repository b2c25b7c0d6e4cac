"""Let the teacher answer the evaluation prompts, before the models of the run are built.

The answers are stored (`evaluation/answer_store.py`), so that the teacher generates once. For that the whole teacher is
built, with its LM head; it is gone before the other models take memory.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.config import Config
from megatron_oprd.data.sharding import split
from megatron_oprd.evaluation.answer_store import AnswerOrigin, answers_path, read_answers, write_answers
from megatron_oprd.launch.lengths import answer_limits
from megatron_oprd.launch.models import build_answering_teacher
from megatron_oprd.launch.setup import Setup
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.batch_rows import rows_at_a_time
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.runtime import platform, progress
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import Prompt, Rollout, UserError

EVALUATION_SEED = 1_000_003  # added to train.seed: every evaluation draws the same numbers, other ones than training


@dataclass(frozen=True)
class AnswerRequest:
    """The single teacher, and the prompts that it has to answer."""

    config: Config
    setup: Setup  # with the tokens at which the student's answers stop
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    vocab_size: int  # number of token ids that both models have
    teacher_hash: str  # `content_hash` of the teacher

    @property
    def teacher(self) -> PlannedTeacher:
        """Return the teacher."""
        (teacher,) = self.setup.teachers.values()
        return teacher

    @property
    def folder(self) -> Path:
        """Return the folder of the answers."""
        own = self.config.evaluation.answers_dir
        return Path(self.config.train.run_dir) / "teacher_answers" if own is None else Path(own)

    def origin(self) -> AnswerOrigin:
        """Return everything that the answers depend on.

        Raises UserError if no prompt leaves room for an answer.
        """
        evaluation, path = self.config.evaluation, self.teacher.config.path
        limits = answer_limits(self.config, self.setup, self.prompts, self.config.evaluation_tokens)
        with_room = [(prompt, limit) for prompt, limit in zip(self.prompts, limits, strict=True) if limit > 0]
        if not with_room:
            raise UserError(
                "evaluation.data: no prompt leaves room for an answer of the teacher in batch.max_tokens_per_micro_"
                f"batch={self.config.batch.max_tokens_per_micro_batch} tokens and the positions of the models; raise "
                "it or set evaluation.teacher_answers=false"
            )
        ends = {*self.setup.student.eos_token_ids, *self.teacher.spec.eos_token_ids}
        return AnswerOrigin(
            teacher=path,
            teacher_hash=self.teacher_hash,
            sampling=Sampling(evaluation.temperature, evaluation.top_p, 0, self.config.evaluation_tokens),
            seed=self.config.train.seed + EVALUATION_SEED,
            end_tokens=tuple(sorted(ends)),
            vocab_size=self.vocab_size,
            prompts=[prompt for prompt, _ in with_room],
            limits=[limit for _, limit in with_room],
        )


def teacher_answers(request: AnswerRequest, topology: Topology) -> tuple[Rollout, ...]:
    """Return the teacher's answers, the same on every rank. They are made if the folder does not have them.

    `topology` is the teacher's layout. Collective over the world. Raises UserError on every rank.
    """
    progress.enter("teacher answers")
    folder, origin = request.folder, request.origin()
    stored = on_rank_zero(lambda: read_answers(folder, origin))
    made = stored is None
    if made:
        answers = _generate(request, origin, topology)
        platform.release_cached_memory(topology.device)  # of the teacher, which is gone
        on_rank_zero(lambda: write_answers(folder, origin, answers, request.tokenizer))
        stored = on_rank_zero(lambda: read_answers(folder, origin))  # what a later start reads, to the last detail
    assert stored is not None
    tokens, left_out = sum(len(answer.response_ids) for answer in stored), len(request.prompts) - len(stored)
    note = f"; {left_out} prompts leave no room" if left_out else ""
    how = "made now, in" if made else "read from"
    line = f"the teacher's answers to {len(stored)} evaluation prompts ({tokens:,} tokens{note}): {how} "
    on_rank_zero(lambda: print(f"{line}{answers_path(folder, origin)}", flush=True))
    return tuple(stored)


def _generate(request: AnswerRequest, origin: AnswerOrigin, topology: Topology) -> list[Rollout]:
    """Return the answers in the order of the prompts, on every rank. Collective over the world."""
    config, spec = request.config, dataclasses.replace(request.teacher.spec, eos_token_ids=origin.end_tokens)
    prompts = [dataclasses.replace(one, prompt_ids=one.teacher_prompt_ids or one.prompt_ids) for one in origin.prompts]
    longest = max(len(prompt.prompt_ids) + limit for prompt, limit in zip(prompts, origin.limits, strict=True))
    stage = build_answering_teacher(config, request.setup, request.teacher, topology)
    with topology.active():
        engine = EmbeddedEngine(
            stage,
            spec,
            topology,
            origin.sampling,
            seed=origin.seed,
            max_batch=rows_at_a_time(spec, topology, stage, longest),
            vocab_size=origin.vocab_size,
            progress=topology.rank == 0,
        )
        own = (split(part, topology.replica_rank, topology.num_replicas) for part in (prompts, origin.limits))
        local_prompts, local_limits = own
        answers = share_rollouts(engine.generate(local_prompts, 0, local_limits), topology)
    return [
        dataclasses.replace(
            answer,
            prompt_ids=prompt.prompt_ids,
            teacher_prompt_ids=prompt.teacher_prompt_ids,
            data_source=prompt.data_source,
        )
        for answer, prompt in zip(answers, origin.prompts, strict=True)
    ]
