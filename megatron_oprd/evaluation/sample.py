"""Graded samples and the evaluation metrics over them (pure: gathering them from the ranks is the caller's part)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_oprd.evaluation.math_answer import is_correct
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.types import FinishReason, Prompt, Rollout

Generate = Callable[[Sequence[Prompt], int], list[Rollout]]  # (prompts, step) -> the rollouts of each prompt
ALL_SOURCES = "all"


@dataclass(frozen=True)
class Sample:
    """One graded response to `prompt`. `num_tokens` counts the response in the student's tokens, its EOS included."""

    prompt: Prompt
    response_text: str
    num_tokens: int
    finish_reason: FinishReason
    correct: bool
    answered: bool
    sample_index: int = 0


def evaluate(
    generate: Generate, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, *, step: int
) -> list[Sample]:
    """Samples responses to `prompts` with `generate`, decodes and grades them.

    Raises ValueError when `generate` returns a rollout of a prompt that was not asked for.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    samples = []
    for rollout in generate(prompts, step):
        progress.beat()
        if rollout.prompt_index not in by_index:
            raise ValueError(f"a rollout belongs to prompt {rollout.prompt_index}, which was not asked for")
        samples.append(grade(by_index[rollout.prompt_index], rollout, tokenizer))
    return samples


def grade(prompt: Prompt, rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Sample:
    """The graded sample of one rollout."""
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


def score(samples: Sequence[Sample], samples_per_prompt: int) -> dict[str, float]:
    """The metrics of some samples, n = `samples_per_prompt` of each problem:

    `avg@n`, `best@n` (mean over problems of the mean and the maximum correctness; absent if no problem has a ground
    truth), `dist-4g` (mean over problems with any), `mean_length` (tokens), `unanswered` and `truncated` (fractions
    of the samples). No samples: no metrics. Raises ValueError when a problem has more or fewer than n samples, which
    would make `avg@n` a mean of something else.
    """
    if not samples:
        return {}
    n = samples_per_prompt
    problems: dict[int, list[Sample]] = {}
    for sample in samples:
        problems.setdefault(sample.prompt.index, []).append(sample)
    for index, group in problems.items():
        if len(group) != n:
            raise ValueError(f"prompt {index} has {len(group)} samples instead of {n}")
    metrics: dict[str, float] = {}
    graded = [group for group in problems.values() if group[0].prompt.ground_truth is not None]
    if graded:
        metrics[f"avg@{n}"] = _mean([_mean([float(s.correct) for s in group]) for group in graded])
        metrics[f"best@{n}"] = _mean([float(any(s.correct for s in group)) for group in graded])
    diversities = [distinct_4grams([s.response_text for s in group]) for group in problems.values()]
    known = [diversity for diversity in diversities if diversity is not None]
    if known:
        metrics["dist-4g"] = _mean(known)
    metrics["mean_length"] = _mean([float(s.num_tokens) for s in samples])
    metrics["unanswered"] = _mean([float(not s.answered) for s in samples])
    metrics["truncated"] = _mean([float(s.finish_reason == "length") for s in samples])
    return metrics


def score_by_source(samples: Sequence[Sample], samples_per_prompt: int) -> dict[str, dict[str, float]]:
    """`score` for each data source, in order of appearance, and over all problems as `all` if there are several."""
    sources: dict[str, list[Sample]] = {}
    for sample in samples:
        sources.setdefault(sample.prompt.data_source, []).append(sample)
    scores = {source: score(group, samples_per_prompt) for source, group in sources.items()}
    if len(sources) > 1:
        scores[ALL_SOURCES] = score(samples, samples_per_prompt)
    return scores


def distinct_4grams(texts: Sequence[str]) -> float | None:
    """Unique / total whitespace 4-grams, pooled over the texts; None when no text has four words."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.split()
        grams += zip(words, words[1:], words[2:], words[3:], strict=False)
    return len(set(grams)) / len(grams) if grams else None


def write_samples(path: Path, step: int, samples: Sequence[Sample]) -> None:
    """Writes the samples to a JSONL file to read, one object each; a file that is there is replaced. One rank calls
    it. Raises UserError for a disk that does not take it."""
    lines = [
        {
            "step": step,
            "prompt": sample.prompt.text,
            "response": sample.response_text,
            "prompt_index": sample.prompt.index,
            "sample_index": sample.sample_index,
            "finish_reason": sample.finish_reason,
            "num_tokens": sample.num_tokens,
            "data_source": sample.prompt.data_source,
            "ground_truth": sample.prompt.ground_truth,
            "correct": sample.correct,
            "answered": sample.answered,
        }
        for sample in samples
    ]
    with explain_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
