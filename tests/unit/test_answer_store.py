"""The teacher's stored answers belong to one teacher, prompts and settings, and a damaged file is refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from megatron_oprd.data.prompts import PromptSet
from megatron_oprd.evaluation.answer_store import AnswerOrigin, answers_path, read_answers, write_answers
from megatron_oprd.evaluation.measure import divide_answers
from megatron_oprd.launch.evaluation_inputs import takes_teacher_answers
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.types import Prompt, Rollout, UserError
from tests.helpers.tokenizer import byte_tokenizer

PROMPTS = [Prompt(4, (1, 2), "12", "a"), Prompt(7, (3,), "3", "b", teacher_prompt_ids=(9, 3))]
ORIGIN = AnswerOrigin("/t", "sha256:1", Sampling(0.7, 0.9, 0, 8), 3, (258,), 259, PROMPTS, [8, 6])
ANSWERS = [
    Rollout((1, 2), (65, 258), (1, 1), "eos", data_source="a"),
    Rollout((3,), (66,), (1,), "length", data_source="b", teacher_prompt_ids=(9, 3)),
]


def test_answers_are_read_back_in_the_order_of_the_prompts(tmp_path):
    assert read_answers(tmp_path, ORIGIN) is None
    write_answers(tmp_path / "new", ORIGIN, ANSWERS, byte_tokenizer())
    found = read_answers(tmp_path / "new", ORIGIN)
    kept = ("prompt_ids", "response_ids", "response_mask", "data_source", "teacher_prompt_ids")
    assert [[getattr(one, name) for name in kept] for one in found] == [
        [getattr(one, name) for name in kept] for one in ANSWERS
    ]
    path = answers_path(tmp_path / "new", ORIGIN)
    assert [json.loads(line)["response"] for line in path.read_text().splitlines()] == ["b", "c"]
    assert json.loads(path.with_suffix(".json").read_text())["teacher"] == {"path": "/t", "hash": "sha256:1"}


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_hash": "sha256:2"},
        {"sampling": Sampling(0.0, 0.9, 0, 8)},
        {"seed": 4},
        {"end_tokens": (2,)},
        {"vocab_size": 131},
        {"prompts": [PROMPTS[0], dataclasses.replace(PROMPTS[1], prompt_ids=(5,))]},
        {"prompts": [PROMPTS[0], dataclasses.replace(PROMPTS[1], teacher_prompt_ids=None)]},
        {"limits": [8, 8]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_answers_of_another_teacher_other_prompts_or_settings_are_not_read(change, tmp_path):
    write_answers(tmp_path, ORIGIN, ANSWERS, byte_tokenizer())
    assert read_answers(tmp_path, dataclasses.replace(ORIGIN, **change)) is None


def test_a_teacher_that_has_moved_has_the_same_answers(tmp_path):
    write_answers(tmp_path, ORIGIN, ANSWERS, byte_tokenizer())
    assert read_answers(tmp_path, dataclasses.replace(ORIGIN, teacher="/elsewhere")) is not None


def test_a_file_without_some_answers_is_refused(tmp_path):
    write_answers(tmp_path, ORIGIN, ANSWERS, byte_tokenizer())
    path = answers_path(tmp_path, ORIGIN)
    path.write_text(path.read_text().splitlines()[0] + "\n")
    with pytest.raises(UserError, match=f"{path} does not hold the teacher's answers to these prompts; remove it"):
        read_answers(tmp_path, ORIGIN)


def takes(wanted, *, teachers=1, graded=False, other_tokenizer=False, teacher=None):
    named = {str(number): None for number in range(teachers)}
    evaluation = SimpleNamespace(teacher_answers=wanted)
    config = SimpleNamespace(
        evaluation=evaluation, named_teachers=named, teachers=named if teachers > 1 else {}, teacher=teacher
    )
    prompts = [dataclasses.replace(prompt, ground_truth="4" if graded else None) for prompt in PROMPTS]
    return takes_teacher_answers(config, PromptSet(prompts, 2, 0, 0), lambda: other_tokenizer)


def test_the_teacher_answers_by_default_if_no_prompt_has_a_right_answer():
    assert takes("auto") and not takes("auto", graded=True)
    assert takes(True) and takes(True, graded=True)
    assert not takes(False)


@pytest.mark.parametrize(
    ("options", "obstacle"),
    [
        ({"teachers": 2}, "several teachers"),
        ({"teachers": 0}, "no teacher"),
        ({"other_tokenizer": True}, "a teacher with another tokenizer"),
    ],
)
def test_only_a_single_teacher_with_the_students_tokenizer_answers(options, obstacle):
    assert not takes("auto", **options)
    with pytest.raises(UserError, match=f"teacher_answers=true needs one teacher .* there is {obstacle}; use "):
        takes(True, **options)


def test_a_teacher_without_a_folder_is_named_if_its_answers_are_left_out(capsys):
    teacher = SimpleNamespace(path="Qwen/Qwen3-8B")
    assert not takes("auto", teacher=teacher)
    assert capsys.readouterr().out.startswith("no folder teacher.path=Qwen/Qwen3-8B: the student is not measured on ")
    assert not takes("auto", teacher=teacher, graded=True) and not takes(False, teacher=teacher)
    assert not capsys.readouterr().out


def test_answers_are_measured_in_parts_of_so_many_tokens():
    answers = [Rollout((1,) * prompt, (2,) * 4, (1,) * 4, "eos") for prompt in (1, 2, 1, 9, 1)]
    assert [[len(one.prompt_ids) for one in part] for part in divide_answers(answers, 11)] == [[1, 2], [1], [9], [1]]
    assert divide_answers(answers, 100) == [answers]
    assert divide_answers([], 11) == []
