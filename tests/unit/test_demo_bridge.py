"""Pairs of unlike models as `make_bridge_pair` writes them: how they read additions, and where they are compared."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from examples.demo import make_bridge_pair
from examples.demo.make_bridge_pair import KINDS, align, parts_of
from examples.demo.task import encode, split_additions, write_rows
from examples.demo.tokenizer import build_tokenizer
from megatron_oprd.checkpoint.weights import check_weights
from megatron_oprd.config import DataConfig, load_config
from megatron_oprd.data.end_tokens import end_of_turn_id
from megatron_oprd.data.prompts import load_prompts
from megatron_oprd.data.tokenizer import check_tokenizer, same_vocabulary
from megatron_oprd.evaluation.math_answer import is_correct
from megatron_oprd.hf.config import read_model_spec

EXAMPLES = Path(__file__).parents[2] / "examples"
PROBLEMS = split_additions(seed=5).heldout[:300]


@pytest.fixture(scope="module", params=KINDS)
def parts(request):
    return parts_of(request.param)


@pytest.fixture(scope="module")
def unlike_tokenizers():
    return parts_of("cross_tokenizer")


def answers_of(problems, part):
    return [problem.answer.rjust(part.answer_width) for problem in problems]


def test_saved_models_are_read_and_differ_in_depth_and_width(parts, tmp_path):
    specs = []
    for part in parts:
        part.build(0).save_pretrained(tmp_path)
        part.tokenizer.save_pretrained(tmp_path)
        spec = read_model_spec(tmp_path)
        check_weights(tmp_path, spec)
        check_tokenizer(AutoTokenizer.from_pretrained(tmp_path), spec)
        assert end_of_turn_id(part.tokenizer) in spec.eos_token_ids
        assert all(size % 2 == 0 for size in (spec.vocab_size, spec.num_attention_heads, spec.num_query_groups))
        specs.append(spec)
    student, teacher = specs
    assert student.num_layers != teacher.num_layers and student.hidden_size < teacher.hidden_size


def test_a_saved_tokenizer_gives_every_answer_back(parts, tmp_path):
    for part in parts:
        part.tokenizer.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        for problem, row in zip(PROBLEMS, part.encode(PROBLEMS).tolist(), strict=True):
            response = row[-part.response_length :]
            assert response.index(end_of_turn_id(tokenizer)) == len(response) - 1
            text = tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert is_correct(text, problem.answer, "exact").correct
            assert problem.prompt in tokenizer.decode(row[: -part.response_length], skip_special_tokens=True)


def test_the_student_of_other_architecture_reads_what_the_demos_does():
    student, teacher = parts_of("cross_architecture")
    assert same_vocabulary(student.tokenizer, teacher.tokenizer)
    for part in (student, teacher):
        torch.testing.assert_close(part.encode(PROBLEMS), encode(PROBLEMS), rtol=0, atol=0)


def test_the_student_of_another_tokenizer_has_the_demos_ids(unlike_tokenizers):
    student, teacher = unlike_tokenizers
    assert student.tokenizer("123+456= 07")["input_ids"] == build_tokenizer()("123+456= 07")["input_ids"]
    assert student.tokenizer.decode(student.tokenizer("  07")["input_ids"]) == "  07"
    assert not same_vocabulary(student.tokenizer, teacher.tokenizer)


def test_the_teacher_reads_its_own_prompt_and_ends_with_its_own_token(unlike_tokenizers, tmp_path):
    write_rows(tmp_path / "rows.jsonl", PROBLEMS)
    student, teacher = (
        load_prompts([str(tmp_path / "rows.jsonl")], part.tokenizer, DataConfig()) for part in unlike_tokenizers
    )
    assert len(student.prompts) == len(teacher.prompts) == len(PROBLEMS)
    for problem, own, of_teacher in zip(PROBLEMS, student.prompts, teacher.prompts, strict=True):
        assert own.text == problem.prompt
        assert of_teacher.text == f"<|user|>{problem.prompt}<|end|><|assistant|>"
    tokenizer = unlike_tokenizers[1].tokenizer
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>") != tokenizer.eos_token_id
    assert "<|end|>" not in unlike_tokenizers[0].tokenizer.get_vocab()
    for part, prompts in zip(unlike_tokenizers, (student, teacher), strict=True):
        rows = part.encode(PROBLEMS)[:, : -part.response_length].tolist()
        assert rows == [list(prompt.prompt_ids) for prompt in prompts.prompts]


def test_two_architectures_with_one_tokenizer_are_compared_everywhere():
    student, teacher = parts_of("cross_architecture")
    assert all(alignment.coverage == 1 for alignment in align(student, teacher, answers_of(PROBLEMS, student)))


def test_two_tokenizers_are_compared_at_some_tokens_but_at_every_choice(unlike_tokenizers):
    """In a right answer the third space chooses between a space and a 1, and each token after it the next digit."""
    student, teacher = unlike_tokenizers
    alignments = align(student, teacher, answers_of(PROBLEMS, student))
    for alignment in alignments:
        assert alignment.student_positions == (2, 3, 4, 5, 6, 7)
        assert alignment.teacher_positions == (0, 1, 2, 3, 4, 5)
        assert alignment.coverage == 0.75


def test_the_teacher_reads_a_right_answer_as_it_learned_it(unlike_tokenizers):
    student, teacher = unlike_tokenizers
    rows = teacher.encode(PROBLEMS)[:, -teacher.response_length :].tolist()
    for row, alignment in zip(rows, align(student, teacher, answers_of(PROBLEMS, student)), strict=True):
        assert row == list(alignment.teacher_ids)


@pytest.mark.parametrize("answer", ["", "   ", "579", "    57", "   19988", "=+ 1", "    579    10", "123+456=  5"])
def test_wrong_answers_are_aligned_to_their_end(answer, unlike_tokenizers):
    student, teacher = unlike_tokenizers
    (alignment,) = align(student, teacher, [answer])
    assert teacher.tokenizer.decode(alignment.teacher_ids[:-1]) == answer
    assert (alignment.student_positions[-1], alignment.teacher_positions[-1]) == (
        alignment.student_tokens - 1,
        len(alignment.teacher_ids) - 1,
    )


def test_a_missed_accuracy_is_one_line_and_exit_code_1_and_writes_nothing(tmp_path, monkeypatch, capsys):
    out = tmp_path / "pair"
    monkeypatch.setattr("sys.argv", ["x", "--kind", "cross_architecture", "--out", str(out), "--steps", "1"])
    assert make_bridge_pair.main() == 1
    assert "the student did not reach" in capsys.readouterr().err
    assert not out.exists()


def test_recipes_load_with_their_bridge_and_without():
    for name, rank in (("cross_architecture", 8), ("cross_tokenizer", 4)):
        for recipe in (name, f"demo_{name}"):
            path = EXAMPLES / f"{recipe}.yaml"
            config = load_config(path, [])
            representation = config.loss.representation
            assert representation.bridge == f"{config.train.run_dir}/bridge/rank_{rank}"
            assert rank in config.bridge.ranks
            assert (representation.weight, representation.normalize) == (10.0, "l2")
            assert load_config(path, ["loss.representation.bridge=null"]).bridge == config.bridge
