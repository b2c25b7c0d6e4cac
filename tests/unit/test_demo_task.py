"""The demo's task, tokenizer and models: what the pair that `make_pair` writes rests on."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.demo import make_pair
from examples.demo.task import Addition, additions, encode, split_additions, write_rows
from examples.demo.tokenizer import EOS_ID, PAD_ID, SYMBOLS, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a student folder as `make_pair` does, with random weights."""
    path = tmp_path_factory.mktemp("student")
    make_pair.build_model(seed=0).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def test_the_saved_tokenizer_opens_and_maps_every_symbol_to_one_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast and len(tokenizer) == len(SYMBOLS) == 16
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS_ID, PAD_ID)
    assert tokenizer.chat_template is None
    assert tokenizer("123+456=")["input_ids"] == [SYMBOLS.index(symbol) for symbol in "123+456="]
    assert tokenizer.decode(tokenizer("123+456=")["input_ids"]) == "123+456="


def test_a_decoded_response_is_the_ground_truth(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for problem in (Addition(123, 456), Addition(987, 654)):
        tokens = encode([problem])[0].tolist()
        prompt = tokenizer(problem.prompt)["input_ids"]
        assert tokens[: len(prompt)] == prompt and tokens[-1] == EOS_ID
        assert tokenizer.decode(tokens[len(prompt) :], skip_special_tokens=True) == problem.answer


def test_answers_open_with_a_space_and_stand_at_the_right():
    short, long = encode([Addition(123, 456), Addition(999, 999)])[:, -6:].tolist()
    assert short == [*(SYMBOLS.index(symbol) for symbol in "  579"), EOS_ID]
    assert long == [*(SYMBOLS.index(symbol) for symbol in " 1998"), EOS_ID]


def test_splits_are_disjoint_cover_every_addition_and_depend_on_the_seed_only():
    splits = split_additions(seed=3)
    parts = [splits.heldout, splits.validation, splits.prompts, additions(splits.supervised)]
    assert [len(part) for part in parts[:3]] == [1000, 1000, 8192]
    assert len(set().union(*parts)) == sum(map(len, parts)) == 900**2
    assert all(100 <= p.left <= 999 and 100 <= p.right <= 999 for p in splits.heldout)
    assert split_additions(seed=3).heldout == splits.heldout
    assert split_additions(seed=4).heldout != splits.heldout


def test_rows_have_the_columns_of_a_prompt_file(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [Addition(123, 456), Addition(999, 999)])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "prompt": "123+456=",
        "data_source": "addition",
        "reward_model": {"ground_truth": "579", "style": "exact"},
    }
    assert rows[1]["reward_model"]["ground_truth"] == "1998"


def test_exact_match_is_what_greedy_generation_scores():
    """On a model trained to 100 % of two problems and to nothing else."""
    model = make_pair.build_model(seed=0)
    known, unknown = [Addition(123, 456), Addition(700, 800)], [Addition(314, 159), Addition(555, 123)]
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(40):
        make_pair.train_step(model, optimizer, encode(known), 1e-3)
    problems, tokenizer = known + unknown, build_tokenizer()
    prompts = torch.tensor(tokenizer([p.prompt for p in problems])["input_ids"])
    generated = model.eval().generate(prompts, do_sample=False, max_new_tokens=8)[:, prompts.shape[1] :]
    right = [tokenizer.decode(r, skip_special_tokens=True) for r in generated]
    score = sum(answer == p.answer for answer, p in zip(right, problems, strict=True)) / len(problems)
    assert score == make_pair.exact_match(model, encode(problems)) == 0.5


def test_the_teacher_keeps_the_students_embedding_and_head(monkeypatch):
    monkeypatch.setattr(make_pair, "TEACHER_ACCURACY", 0.95)
    student = make_pair.build_model(seed=0)
    tokens = encode(split_additions(seed=0).heldout[:4])
    teacher = make_pair.train_teacher(student, itertools.repeat(tokens), tokens, steps=400)
    torch.testing.assert_close(teacher.lm_head.weight, student.lm_head.weight, rtol=0, atol=0)
    torch.testing.assert_close(teacher.model.embed_tokens.weight, student.model.embed_tokens.weight, rtol=0, atol=0)
    assert not torch.equal(teacher.model.layers[0].mlp.up_proj.weight, student.model.layers[0].mlp.up_proj.weight)


def test_the_stored_pair_is_one_that_training_makes():
    student, teacher = make_pair.stored_pair()
    validation = encode(split_additions(0).validation)
    assert make_pair.STUDENT_RANGE[0] <= make_pair.exact_match(student, validation) <= make_pair.STUDENT_RANGE[1]
    assert make_pair.exact_match(teacher, validation) >= make_pair.TEACHER_ACCURACY
    frozen = ("lm_head.weight", "model.embed_tokens.weight")
    same = [name for name, weight in teacher.state_dict().items() if torch.equal(weight, student.state_dict()[name])]
    assert same == sorted(frozen, reverse=True)


def test_a_missed_accuracy_is_one_line_and_exit_code_1_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["make_pair", "--out", str(tmp_path / "pair"), "--train", "--steps", "1"])
    assert make_pair.main() == 1
    assert "the student did not reach" in capsys.readouterr().err
    assert not (tmp_path / "pair").exists()


def test_the_model_folder_stops_at_eos_and_halves_evenly(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    assert model.generation_config.eos_token_id == EOS_ID and config.architectures == ["Qwen3ForCausalLM"]
    assert not config.tie_word_embeddings
    sizes = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.vocab_size)
    assert all(size % 2 == 0 for size in sizes)
