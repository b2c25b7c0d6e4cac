"""The student's response in the tokens of a teacher with another tokenizer, and where the two agree.

The teacher reads its own tokens of the same bytes. After some tokens both have read exactly the same bytes: at these
sync points alone their states are comparable (OPRD eq. (11-15) across tokenizers). Pure, no communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_oprd.data.token_bytes import ByteEncoder, TokenBytes, byte_encoder, token_bytes
from megatron_oprd.data.tokenizer import same_vocabulary
from megatron_oprd.types import Alignment, Rollout, UserError

_ANSWER = "an answer 4b1d"  # stands in a rendered conversation only where it was put


@dataclass(frozen=True)
class Aligner:
    """What it takes to align the responses of one student with one teacher; `make_aligner` makes it."""

    student_eos_ids: frozenset[int]
    end_of_turn_id: int  # what the teacher reads where the student's response ended with an EOS
    student: TokenBytes | None = None  # None, as the teacher's: an id means the same to both
    teacher: ByteEncoder | None = None

    def align(self, response_ids: Sequence[int], *, prompt_tokens: int = 0, max_tokens: int | None = None) -> Alignment:
        """The response in the teacher's tokens, and the sync points.

        The response is tokenised on its own, not together with the prompt's end: no token spans the two. With one
        tokenizer on both sides the ids stay as they were sampled and every position is a sync point. `max_tokens`: the
        most that the teacher reads, `prompt_tokens` of its prompt included; what is over is cut, with its sync points.
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
    """`student_eos_ids`: those at which the rollouts stop. Raises UserError when the tokenizers differ and one of them
    is of a kind whose tokens are not known in bytes. Takes seconds for large vocabularies: once a run."""
    eos_ids = frozenset(student_eos_ids)
    if same_vocabulary(student, teacher):
        return Aligner(eos_ids, teacher_end_of_turn_id)
    return Aligner(eos_ids, teacher_end_of_turn_id, token_bytes(student), byte_encoder(teacher))


def align_rollouts(aligner: Aligner, rollouts: Sequence[Rollout], max_tokens: int) -> list[Rollout]:
    """The rollouts with what the teacher reads of each after its own prompt: at most `max_tokens` together. Pure, no
    communication."""

    def aligned(rollout: Rollout) -> Rollout:
        prompt_ids = rollout.prompt_ids if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
        alignment = aligner.align(rollout.response_ids, prompt_tokens=len(prompt_ids), max_tokens=max_tokens)
        return dataclasses.replace(rollout, alignment=alignment)

    return [aligned(rollout) for rollout in rollouts]


def sync_points(
    text: bytes, ends: np.ndarray, other_text: bytes, other_ends: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of tokens after which both have read the same bytes, as two int64 arrays [points] of their indices.

    `ends` [tokens] int64: the bytes of the text up to each token's end. A token that adds no bytes is in no pair: the
    one before it already ended there. Linear in the bytes.
    """
    equal = _common_prefix(text, other_text)
    grows, other_grows = (np.flatnonzero(np.diff(each, prepend=0)) for each in (ends, other_ends))
    shared, at, other_at = np.intersect1d(ends[grows], other_ends[other_grows], assume_unique=True, return_indices=True)
    return grows[at][shared <= equal], other_grows[other_at][shared <= equal]


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any] | None = None) -> int:
    """The token with which the model ends an answer: the special token that its chat template writes behind one, else
    the tokenizer's EOS, which for many chat models is another. Raises UserError when there is neither."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    behind = _behind_an_answer(tokenizer, chat_template_kwargs or {})
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    found = next((index for index in ids if index in special), tokenizer.eos_token_id)
    if found is None:
        raise UserError(
            f"the tokenizer in {tokenizer.name_or_path or '(unnamed)'} has no token that ends an answer: "
            "set its eos_token or a chat template that writes one"
        )
    return int(found)


def _behind_an_answer(tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any]) -> str:
    if not tokenizer.chat_template:
        return ""
    conversation = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = str(tokenizer.apply_chat_template(conversation, tokenize=False, **kwargs))
    except Exception:  # a template is a program of its own; one for single questions may know no answers
        return ""
    return text.rpartition(_ANSWER)[2] if _ANSWER in text else ""


def _common_prefix(first: bytes, second: bytes) -> int:
    """The number of bytes in which two texts agree from the start."""
    if first == second:
        return len(first)
    length = min(len(first), len(second))
    differs = np.frombuffer(first[:length], np.uint8) != np.frombuffer(second[:length], np.uint8)
    return int(differs.argmax()) if differs.any() else length
