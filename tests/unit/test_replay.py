"""A replay file returns its rollouts in order, and an invalid line is named before anything runs."""

import json

import pytest

from megatron_oprd.rollout.replay import ReplayEngine, check_enough, load_replay, rollouts_of_step
from megatron_oprd.types import Rollout, UserError

GOOD = {"prompt_ids": [1, 2], "response_ids": [3, 4, 5]}


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines) + b"\n")
    return path


def numbered(path, count):
    return write(path, *({"prompt_ids": [i], "response_ids": [i, i]} for i in range(count)))


def test_rollouts_are_read_as_written(tmp_path):
    path = write(tmp_path / "r.jsonl", GOOD, {**GOOD, "response_mask": [1, 0, 1]}, {**GOOD, "response_ids": []})
    assert load_replay(path) == [
        Rollout((1, 2), (3, 4, 5), (1, 1, 1), "replay", prompt_index=0),
        Rollout((1, 2), (3, 4, 5), (1, 0, 1), "replay", prompt_index=1),
        Rollout((1, 2), (), (), "replay", prompt_index=2),
    ]


def test_a_line_may_have_a_data_source_and_a_teacher_prompt(tmp_path):
    extra = {"data_source": "AIME", "teacher_prompt_ids": [1, 9, 2]}
    unset = {"data_source": None, "teacher_prompt_ids": None, "response_mask": None}
    first, second, third = load_replay(write(tmp_path / "r.jsonl", {**GOOD, **extra}, GOOD, {**GOOD, **unset}))
    assert (first.data_source, first.teacher_prompt_ids) == ("AIME", (1, 9, 2))
    assert first.prompt_ids == (1, 2)
    for rollout in (second, third):
        assert (rollout.data_source, rollout.teacher_prompt_ids) == ("", None)


def test_windows_line_ends_and_line_separators_in_strings_are_accepted(tmp_path):
    path = tmp_path / "r.jsonl"
    record = json.dumps({**GOOD, "note": "a\u2028b\u0085c"}, ensure_ascii=False)
    path.write_bytes((record + "\r\n" + record + "\r\n").encode())
    assert len(load_replay(path)) == 2


BAD_LINES = {
    "not UTF-8": (b'{"prompt_ids": [1], "x": "\xff"}', "not UTF-8"),
    "not JSON": (b'{"prompt_ids": [1', "not JSON"),
    "cut short": (b"{", "not JSON"),
    "nested without end": (b"[" * 100_000, "not JSON"),
    "huge number": (b'{"prompt_ids": [' + b"9" * 5000 + b"]}", "not JSON"),
    "no object": ([1, 2], "write one JSON object a line"),
    "no prompt": ({"response_ids": [1]}, "prompt_ids is missing"),
    "no response": ({"prompt_ids": [1]}, "response_ids is missing"),
    "empty prompt": ({**GOOD, "prompt_ids": []}, "prompt_ids is empty"),
    "no list": ({**GOOD, "prompt_ids": "12"}, "prompt_ids must be a list of integers"),
    "float": ({**GOOD, "response_ids": [1.0]}, "response_ids must be a list of integers"),
    "bool": ({**GOOD, "response_ids": [True]}, "response_ids must be a list of integers"),
    "negative": ({**GOOD, "response_ids": [4, -2]}, "negative id -2"),
    "beyond the vocabulary": ({**GOOD, "response_ids": [100]}, "vocabulary ends at 99"),
    "empty teacher prompt": ({**GOOD, "teacher_prompt_ids": []}, "teacher_prompt_ids is empty"),
    "teacher prompt of text": ({**GOOD, "teacher_prompt_ids": "1"}, "teacher_prompt_ids must be a list of integers"),
    "teacher prompt of bools": ({**GOOD, "teacher_prompt_ids": [True]}, "teacher_prompt_ids must be a list of"),
    "negative for the teacher": (
        {**GOOD, "teacher_prompt_ids": [-1]},
        "teacher_prompt_ids contains the negative id -1",
    ),
    "teacher beyond the vocabulary": ({**GOOD, "teacher_prompt_ids": [100]}, "teacher_prompt_ids contains 100, but"),
    "source of another type": ({**GOOD, "data_source": 3}, "data_source must be a string, not a int"),
    "source of a list": ({**GOOD, "data_source": []}, "data_source must be a string, not a list"),
    "mask too short": ({**GOOD, "response_mask": [1, 1]}, "2 entries for 3"),
    "mask of another name": ({**GOOD, "loss_mask": [1, 0, 1]}, "loss_mask is not read; name it response_mask"),
    "repeated key": (b'{"prompt_ids": [1], "prompt_ids": [2]}', "the key 'prompt_ids' occurs twice"),
    "mask value": ({**GOOD, "response_mask": [1, 2, 0]}, "0 and 1"),
    "mask of bools": ({**GOOD, "response_mask": [True, True, False]}, "0 and 1"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named(case, tmp_path):
    line, complaint = BAD_LINES[case]
    path = write(tmp_path / "r.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(UserError) as raised:
        load_replay(path, vocab_size=100)
    message = str(raised.value)
    assert message.startswith(f"{path}, line 3: ") and complaint in message and "\n" not in message


def test_teacher_prompts_are_checked_against_the_teachers_vocabulary(tmp_path):
    line = {**GOOD, "teacher_prompt_ids": [100, 7]}
    path = write(tmp_path / "r.jsonl", line, line)
    assert load_replay(path, vocab_size=6, teacher_vocab_size=101)[1].teacher_prompt_ids == (100, 7)
    with pytest.raises(UserError, match="line 1: response_ids contains 5, but the vocabulary ends at 4"):
        load_replay(path, vocab_size=5, teacher_vocab_size=101)
    for wrong, complaint in (
        ({"teacher_prompt_ids": [101]}, "teacher_prompt_ids contains 101, but the vocabulary ends at 100"),
        ({"teacher_prompt_ids": []}, "teacher_prompt_ids is empty"),
        ({"teacher_prompt_ids": None}, "teacher_prompt_ids is missing: the teacher has another tokenizer"),
        ({}, "teacher_prompt_ids is missing: the teacher has another tokenizer"),
    ):
        write(path, line, {**GOOD, **wrong})
        with pytest.raises(UserError) as raised:
            load_replay(path, vocab_size=101, teacher_vocab_size=101)
        assert str(raised.value).startswith(f"{path}, line 2: {complaint}") and "\n" not in str(raised.value)


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none.jsonl"):
        load_replay(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no rollouts"):
        load_replay(write(tmp_path / "r.jsonl", b"", b""))


def test_each_step_continues_after_the_previous_one(tmp_path):
    rollouts = load_replay(numbered(tmp_path / "r.jsonl", 10))
    assert [r.prompt_index for r in rollouts_of_step(rollouts, 0, 4)] == [0, 1, 2, 3]
    assert [r.prompt_index for r in rollouts_of_step(rollouts, 1, 4)] == [4, 5, 6, 7]
    with pytest.raises(UserError, match=r"10 rollouts, .* need 12: 2 lines are missing"):
        rollouts_of_step(rollouts, 2, 4)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_data_parallel_ranks_share_a_step_without_gap_or_overlap(size, tmp_path):
    path = numbered(tmp_path / "r.jsonl", 12)
    parts = [
        ReplayEngine(load_replay(path), 6, replica_rank=rank, num_replicas=size).generate([], step=1)
        for rank in range(size)
    ]
    assert [r.prompt_index for part in parts for r in part] == [6, 7, 8, 9, 10, 11]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_too_few_lines_for_all_steps_are_found_at_the_start(tmp_path):
    path = numbered(tmp_path / "r.jsonl", 12)
    check_enough(load_replay(path), steps=2, per_step=6)
    with pytest.raises(UserError, match="6 lines are missing"):
        check_enough(load_replay(path), steps=3, per_step=6)
    with pytest.raises(UserError, match=r"1 lines are missing; add them or lower rollout.prompts_per_step"):
        check_enough(load_replay(path), steps=1, per_step=13)  # and not train.steps=0
