"""Align the student's response with the tokens of a teacher that has another tokenizer.

The response is tokenised again, with the teacher's tokenizer, from the same bytes. A pair of tokens that end after the
same bytes is a sync point: only there can hidden states be compared (OPRD eq. (11-15) across tokenizers).
No communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.token_bytes import ByteEncoder, TokenBytes, byte_encoder, token_bytes
from megatron_oprd.data.tokenizer import same_vocabulary
from megatron_oprd.types import Alignment, Rollout


@dataclass(frozen=True)
class Aligner:
    """Aligns the responses of one student with one teacher. `make_aligner` builds it."""

    student_eos_ids: frozenset[int]
    end_of_turn_id: int  # replaces the EOS of the student's response
    student: TokenBytes | None = None  # None (like `teacher`): both models have the same vocabulary
    teacher: ByteEncoder | None = None

    def align(self, response_ids: Sequence[int], *, prompt_tokens: int = 0, max_tokens: int | None = None) -> Alignment:
        """Return the response in the teacher's tokens, and the sync points.

        The response is tokenised without the prompt, so no token spans the two. If both models have the same
        vocabulary, the ids stay as they were sampled and every position is a sync point.

        Args:
            response_ids: the student's response.
            prompt_tokens: length of the teacher's prompt.
            max_tokens: the most tokens of the teacher's prompt and response. Tokens beyond it are cut, with their sync
                points. None: no limit.
        """
        if self.student is None or self.teacher is None:
            teacher_ids = list(response_ids)
            student_at = teacher_at = np.arange(len(teacher_ids))
        else:
            ended = len(response_ids) > 0 and response_ids[-1] in self.student_eos_ids
            said = response_ids[: len(response_ids) - ended]
            text, ends = self.student.spell(said)
            teacher_ids = self.teacher.encode(text)
            read, read_ends = self.teacher.tokens.spell(teacher_ids)
            student_at, teacher_at = sync_points(text, ends, read, read_ends)
            if ended:
                teacher_ids.append(self.end_of_turn_id)
                if read == text:
                    student_at, teacher_at = np.append(student_at, len(said)), np.append(teacher_at, len(read_ends))
        room = len(teacher_ids) if max_tokens is None else max(max_tokens - prompt_tokens, 0)
        kept = teacher_at < room
        return Alignment(
            teacher_ids=tuple(teacher_ids[:room]),
            student_positions=tuple(student_at[kept].tolist()),
            teacher_positions=tuple(teacher_at[kept].tolist()),
            student_tokens=len(response_ids),
            teacher_tokens_cut=max(len(teacher_ids) - room, 0),
        )


def make_aligner(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    student_eos_ids: Collection[int],
    teacher_end_of_turn_id: int,
) -> Aligner:
    """Build the aligner of two tokenizers. For large vocabularies this takes seconds: do it once a run.

    Args:
        student_eos_ids: the ids at which the rollouts stop.
        teacher_end_of_turn_id: see `end_tokens.end_of_turn_id`.

    Raises:
        UserError: the tokenizers differ, and one of them is of a kind whose tokens cannot be converted to bytes.
    """
    eos_ids = frozenset(student_eos_ids)
    if same_vocabulary(student, teacher):
        return Aligner(eos_ids, teacher_end_of_turn_id)
    return Aligner(eos_ids, teacher_end_of_turn_id, token_bytes(student), byte_encoder(teacher))


def align_rollouts(aligner: Aligner, rollouts: Sequence[Rollout], max_tokens: int) -> list[Rollout]:
    """Return the rollouts with their alignments. The teacher's prompt and response have at most `max_tokens` tokens."""

    def aligned(rollout: Rollout) -> Rollout:
        prompt_ids = rollout.prompt_ids if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
        alignment = aligner.align(rollout.response_ids, prompt_tokens=len(prompt_ids), max_tokens=max_tokens)
        return dataclasses.replace(rollout, alignment=alignment)

    return [aligned(rollout) for rollout in rollouts]


def sync_points(
    text: bytes, ends: np.ndarray, other_text: bytes, other_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs of tokens that end after the same bytes, as two arrays [points] int64 of token indices.

    A token without bytes is in no pair: the token before it ends at the same place. The time is linear in the bytes.

    Args:
        text: the bytes of the first token sequence.
        ends: [tokens] int64, the number of bytes up to the end of each token.
        other_text: the bytes of the second token sequence.
        other_ends: likewise.
    """
    equal = _common_prefix(text, other_text)
    grows, other_grows = (np.flatnonzero(np.diff(each, prepend=0)) for each in (ends, other_ends))
    shared, at, other_at = np.intersect1d(ends[grows], other_ends[other_grows], assume_unique=True, return_indices=True)
    return grows[at][shared <= equal], other_grows[other_at][shared <= equal]


def _common_prefix(first: bytes, second: bytes) -> int:
    """Return the length of the common prefix in bytes."""
    if first == second:
        return len(first)
    length = min(len(first), len(second))
    differs = np.frombuffer(first[:length], np.uint8) != np.frombuffer(second[:length], np.uint8)
    return int(differs.argmax()) if differs.any() else length
