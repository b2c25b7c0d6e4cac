"""Sampling, grading and scores of an evaluation, on samples few enough to count by hand."""

import json

import pytest

from megatron_oprd.evaluation.grading import Sample
from megatron_oprd.evaluation.sampling import sample_and_grade, write_samples
from megatron_oprd.evaluation.scores import distinct_4grams, score, score_by_source
from megatron_oprd.training.run_log import scores_in_words
from megatron_oprd.types import Prompt, Rollout
from tests.helpers.tokenizer import byte_tokenizer


def prompt(index: int, source: str = "s", ground_truth: str | None = "4", style: str = "rule") -> Prompt:
    return Prompt(index, (1, 2), f"question {index}", source, ground_truth, style)


def sample(of: Prompt, correct: bool, **values) -> Sample:
    return Sample(
        **{
            "prompt": of,
            "response_text": "a b c d e",
            "num_tokens": 10,
            "finish_reason": "eos",
            "correct": correct,
            "answered": True,
            **values,
        }
    )


def test_metrics_equal_those_counted_by_hand():
    easy, hard = prompt(0), prompt(1)
    samples = [
        sample(easy, True, response_text="a b c d a b c d"),  # 5 four-grams, abcd twice
        sample(hard, False, response_text="x y", answered=False, num_tokens=40, finish_reason="length"),
        sample(easy, False, response_text="a b c d"),  # abcd again
        sample(hard, False, response_text="p q r s t", num_tokens=20),
        sample(easy, True, response_text="no"),
        sample(hard, True, response_text="", num_tokens=4, finish_reason="eos"),
    ]
    assert score(samples, 3) == pytest.approx(
        {
            "avg@3": (2 / 3 + 1 / 3) / 2,
            "best@3": 1.0,
            "dist-4g": (4 / 6 + 2 / 2) / 2,
            "mean_length": (10 + 40 + 10 + 20 + 10 + 4) / 6,
            "unanswered": 1 / 6,
            "truncated": 1 / 6,
        }
    )


def test_best_at_n_is_the_maximum_over_the_samples_and_not_a_bootstrap_estimate():
    samples = [sample(prompt(0), i == 15) for i in range(16)] + [sample(prompt(1), False) for _ in range(16)]
    assert score(samples, 16)["best@16"] == 0.5
    assert score(samples, 16)["avg@16"] == pytest.approx(1 / 32)


def test_problems_have_equal_weight_and_problems_without_ground_truth_are_left_out():
    samples = [sample(prompt(0), True), sample(prompt(1, ground_truth=None), False)]
    assert score(samples, 1)["avg@1"] == 1.0
    assert "avg@1" not in score(samples[1:], 1)
    assert score([], 4) == {}


def test_samples_without_a_ground_truth_are_neither_graded_nor_unanswered():
    ungraded = [sample(prompt(1, ground_truth=None), False, answered=False)]
    assert score(ungraded, 1).keys() == {"dist-4g", "mean_length", "truncated"}
    mixed = [sample(prompt(0), True, answered=True), *ungraded]
    assert score(mixed, 1)["unanswered"] == 0.0
    assert scores_in_words(score(ungraded, 1)) == "not graded, dist-4g 1, mean_length 10, truncated 0"
    assert scores_in_words(score(mixed, 1)).startswith("avg@1 1, best@1 1, ")
    assert scores_in_words({"cosine": 0.5, "cosine/layer_1": 0.5}) == "not graded, cosine 0.5"


@pytest.mark.parametrize("count", [1, 3])
def test_a_missing_or_extra_sample_is_an_error(count):
    samples = [sample(prompt(0), True)] * 2 + [sample(prompt(7), True)] * count
    with pytest.raises(ValueError, match=f"prompt 7 has {count} samples instead of 2"):
        score(samples, 2)


def test_texts_of_fewer_than_four_words_have_no_dist_4g():
    assert distinct_4grams(["a b c", ""]) is None
    assert distinct_4grams(["a b c d"]) == 1.0
    assert distinct_4grams(["a a a a a a"]) == pytest.approx(1 / 3)
    assert "dist-4g" not in score([sample(prompt(0), True, response_text="short")], 1)


def test_scores_are_computed_for_each_source_and_over_all():
    samples = [sample(prompt(0, "A"), True), sample(prompt(1, "B"), False), sample(prompt(2, "B"), False)]
    scores = score_by_source(samples, 1)
    assert list(scores) == ["A", "B", "all"]
    assert [scores[name]["avg@1"] for name in scores] == pytest.approx([1.0, 0.0, 1 / 3])
    assert list(score_by_source(samples[1:], 1)) == ["B"]


def rollout(index: int, text: str, sample_index: int, finish_reason: str = "eos") -> Rollout:
    ids = (*byte_tokenizer().encode(text), *([258] if finish_reason == "eos" else []))
    return Rollout((1, 2), ids, (1,) * len(ids), finish_reason, index, sample_index)


def test_rollouts_are_matched_to_their_prompts_then_decoded_and_graded():
    prompts = [prompt(5), prompt(9, ground_truth="042", style="exact")]
    calls = []

    def generate(given, step):
        calls.append((list(given), step))
        return [
            rollout(9, "042", 0),
            rollout(5, "So \\boxed{4}", 1),
            rollout(5, "So \\boxed{", 0, "length"),
            rollout(9, "42", 1),
        ]

    samples = sample_and_grade(generate, prompts, byte_tokenizer(), step=3)
    assert calls == [(prompts, 3)]
    assert [(s.prompt.index, s.sample_index, s.correct, s.answered) for s in samples] == [
        (9, 0, True, True),
        (5, 1, True, True),
        (5, 0, False, False),
        (9, 1, False, True),
    ]
    assert samples[1].response_text == "So \\boxed{4}"  # without the EOS
    assert samples[1].num_tokens == len("So \\boxed{4}") + 1  # with it
    assert score(samples, 2)["truncated"] == 0.25


def test_a_rollout_of_an_unknown_prompt_is_an_error():
    with pytest.raises(ValueError, match="prompt 6"):
        sample_and_grade(lambda *_: [rollout(6, "x", 0)], [prompt(5)], byte_tokenizer(), step=0)


def test_writing_samples_replaces_the_file_of_an_interrupted_evaluation(tmp_path):
    path = tmp_path / "evaluations" / "step_4.jsonl"
    for step in (0, 4):
        write_samples(path, step, [sample(prompt(3), True, response_text="é\n", sample_index=i) for i in (2, 3)])
    first, second = (json.loads(line) for line in path.read_text("utf-8").splitlines())
    assert (first["step"], first["prompt"], first["response"]) == (4, "question 3", "é\n")
    assert (first["prompt_index"], first["sample_index"], first["finish_reason"]) == (3, 2, "eos")
    assert second == {**first, "sample_index": 3}
