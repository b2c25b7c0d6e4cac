"""Many answers that the length limit cuts give one warning with the likely causes."""

import json

import pytest

from megatron_oprd.data.end_tokens import EndTokens
from megatron_oprd.health.cut_answers import cut_answers_warning

END = EndTokens({258: "chat template"}, {258: "<|im_end|>"})


def warnings(folder, shares, *, last_step=100, end_tokens=END):
    """Return the warnings of all steps by step; `shares` are the shares of cut answers in each step."""
    found = {}
    with (folder / "metrics.jsonl").open("w") as file:
        for step, share in enumerate(shares, start=1):
            file.write(json.dumps({"step": step, "rollout/truncated_fraction": share}) + "\n")
            file.flush()
            if warning := cut_answers_warning(folder, step, last_step, 16, end_tokens):
                found[step] = warning
    return found


def test_many_cut_answers_give_one_warning_with_the_likely_causes(tmp_path):
    found = warnings(tmp_path, [1.0, 0.5, 1.0, 0.5, 1.0, 1.0, 1.0, 1.0])
    assert list(found) == [5]
    assert found[5] == (
        "80% of the answers of the first 5 steps were cut; likely causes: rollout.max_new_tokens=16 is too small; "
        "the student does not write a token that ends its answers: <|im_end|> (258; chat template); "
        "a base model has not learned to end an answer"
    )


def test_a_template_without_an_end_of_turn_token_is_named(tmp_path):
    end_tokens = EndTokens({256: "model files"}, {256: "<|endoftext|>"})
    (warning,) = warnings(tmp_path, [1.0] * 5, end_tokens=end_tokens).values()
    assert "<|endoftext|> (256; model files); the chat template writes no end-of-turn token" in warning


@pytest.mark.parametrize("shares", [[0.5] * 8, [0.0] * 5 + [1.0] * 5, [1.0] * 4])
def test_few_or_late_cut_answers_give_no_warning(tmp_path, shares):
    assert warnings(tmp_path, shares) == {}


def test_a_short_run_is_judged_at_its_end(tmp_path):
    assert list(warnings(tmp_path, [1.0, 1.0], last_step=2)) == [2]


def test_stored_answers_are_not_judged(tmp_path):
    assert warnings(tmp_path, [1.0] * 8, end_tokens=None) == {}
