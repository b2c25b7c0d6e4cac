"""A graded answer: its text, whether it is correct, and whether the response contains an answer at all.

`math_answer.py` compares the answer with the ground truth. Sampling and the health watch call `grade`.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_oprd.evaluation.math_answer import is_correct
from megatron_oprd.types import FinishReason, Prompt, Rollout


@dataclass(frozen=True)
class Sample:
    """A graded response to a prompt."""

    prompt: Prompt
    response_text: str
    num_tokens: int  # of the response in the student's tokens, the EOS included
    finish_reason: FinishReason
    correct: bool
    answered: bool
    sample_index: int = 0


def grade(prompt: Prompt, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """Decode a rollout and compare its answer with the prompt's ground truth."""
    text = str(
        tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
    result = is_correct(text, prompt.ground_truth, prompt.answer_style)
    return Sample(
        prompt=prompt,
        response_text=text,
        num_tokens=len(rollout.response_ids),
        finish_reason=rollout.finish_reason,
        correct=result.correct,
        answered=result.answered,
        sample_index=rollout.sample_index,
    )
