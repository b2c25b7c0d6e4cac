"""The evaluation metrics over graded samples. No communication: every rank has all samples."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.evaluation.grading import Sample
from megatron_oprd.evaluation.records import ALL_SOURCES, Scores, overall_source


def merge_scores(first: Scores, second: Scores) -> Scores:
    """Return the metrics of both for each data source; the sources of `second` come first."""
    return {source: first.get(source, {}) | second.get(source, {}) for source in {**second, **first}}


def over_all_sources(scores: Scores) -> dict[str, float]:
    """Return the metrics over all data sources, or of the only one; an empty dict without scores."""
    return scores.get(overall_source(scores), {})


def score_by_source(samples: Sequence[Sample], samples_per_prompt: int) -> Scores:
    """Return the metrics (see `score`) of each data source, in order of appearance.

    With several sources the entry `all` has the metrics over all problems.
    """
    sources: dict[str, list[Sample]] = {}
    for sample in samples:
        sources.setdefault(sample.prompt.data_source, []).append(sample)
    scores = {source: score(group, samples_per_prompt) for source, group in sources.items()}
    if len(sources) > 1:
        scores[ALL_SOURCES] = score(samples, samples_per_prompt)
    return scores


def score(samples: Sequence[Sample], samples_per_prompt: int) -> dict[str, float]:
    """Return the metrics of samples that contain each problem n = `samples_per_prompt` times.

    Returns (an empty dict without samples):
        avg@n: mean correctness of a problem's samples, averaged over the problems with a ground truth.
        best@n: fraction of these problems with at least one correct sample.
        dist-4g: `distinct_4grams` of a problem's responses, averaged over the problems that have 4-grams.
        mean_length: mean number of tokens of a response.
        unanswered: fraction of the samples of these problems without an answer.
        truncated: fraction of the samples that were cut off at the length limit.

    Raises ValueError when a problem has more or fewer than n samples: `avg@n` would be another mean than its name says.
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
    if graded:
        metrics["unanswered"] = _mean([float(not s.answered) for group in graded for s in group])
    metrics["truncated"] = _mean([float(s.finish_reason == "length") for s in samples])
    return metrics


def distinct_4grams(texts: Sequence[str]) -> float | None:
    """Return the number of unique 4-grams of words over their total number, pooled over the texts.

    Words are separated by whitespace. Returns None when no text has four words.
    """
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.split()
        grams += zip(words, words[1:], words[2:], words[3:], strict=False)
    return len(set(grams)) / len(grams) if grams else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
