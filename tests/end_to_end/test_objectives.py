"""Whole runs with objectives on next-token distributions: several teachers, teachers' own prompts, layouts, exports."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oprd.config import load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_metrics, reference_update
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from tests.helpers.commands import run
from tests.helpers.killable import finish
from tests.helpers.runs import (
    HINTED,
    SOURCES,
    VOCAB_SIZE,
    assert_same_export,
    in_folder,
    metrics,
    prompt_run,
    read_lines,
)
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

ALONE = ("loss.representation.weight=0", "loss.output.objective=full_kl", "loss.output.metrics_every=1")
LAYERS = {"num_hidden_layers": 2}


def tensors(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def _first_step(rank, arguments):
    _, of_step, rollouts = one_step(build_run(read_inputs(load_config(None, arguments))), TrainState())
    return of_step, rollouts


def assert_first_step_is_the_reference(arguments, run_dir, student, teachers):
    """Assert that loss and metrics of the first step equal those of transformers' models in float64."""
    [(again, rollouts)] = run_distributed(1, _first_step, arguments)
    first = metrics(run_dir)[0]
    assert first["loss"] == again["loss"]
    expected = reference_metrics(student, teachers, *ALONE, rollouts=rollouts)
    expected["loss"] = reference_update(student, teachers, *ALONE, rollouts=rollouts).loss
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert first["output/num_tokens"] == sum(len(rollout.response_ids) for rollout in rollouts)
    return rollouts


def one_character_teacher(folder, answer, tokenizer):
    """Save a teacher that always answers with one character."""
    model = random_hf_model("Qwen3", seed=9, vocab_size=VOCAB_SIZE, **LAYERS)
    with torch.no_grad():
        # One large entry in all embeddings stays the largest of the states, and the head reads nothing else.
        model.model.embed_tokens.weight[:, 0] = 20
        model.model.norm.weight.fill_(1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer(answer)["input_ids"], 0] = 2
    tokenizer.save_pretrained(folder)
    return save(model, folder)


def answers(folder, tokenizer, texts):
    """Return plain transformers' greedy answers."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for text in texts:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)["input_ids"]
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        found.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return found


def test_each_prompt_has_the_teacher_of_its_source(tmp_path):
    """The student learns the one's answer to numbers, the other's to words."""
    tokenizer = byte_tokenizer(chat=CHAT_TEMPLATE)
    student = save(random_hf_model("Qwen3", vocab_size=VOCAB_SIZE, **LAYERS), tmp_path / "student")
    tokenizer.save_pretrained(student)
    teachers = {
        "numbers": one_character_teacher(tmp_path / "X", "X", tokenizer),
        "words": one_character_teacher(tmp_path / "Y", "Y", tokenizer),
    }
    prompts = [{"prompt": str(1111 * number), "data_source": "numbers"} for number in range(1, 9)]
    prompts += [{"prompt": 4 * letter, "data_source": "words"} for letter in "abcdefgh"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    arguments = [
        f"student.path={student}",
        *(f"teachers.{name}.path={path}" for name, path in teachers.items()),
        f"data.prompts=[{tmp_path / 'prompts.jsonl'}]",
        "rollout.prompts_per_step=8",
        "rollout.samples_per_prompt=1",
        "rollout.max_new_tokens=4",
        f"train.run_dir={tmp_path / 'run'}",
        "train.steps=50",
        "checkpoint.every=0",
        "precision.dtype=fp32",
        "optimizer.lr=3.0e-3",
        *ALONE,
    ]
    finish(arguments, tmp_path / "log", world_size=2)
    assert_first_step_is_the_reference(arguments, tmp_path / "run", student, teachers)
    texts = ["1111", "6666", "4321", "8765", "aaaa", "gggg", "hgfe", "badc"]  # some of them not trained on
    found = answers(tmp_path / "run" / "hf", tokenizer, texts)
    assert found == ["XXXX"] * 4 + ["YYYY"] * 4


def test_a_teacher_among_others_teaches_as_if_alone(tmp_path):
    """If all prompts have one source, two teachers give bit for bit the result of that one, in any order."""
    arguments = prompt_run(tmp_path, 3, "loss.output.objective=topk_kl", sources=SOURCES, **LAYERS)
    rows = read_lines(tmp_path / "prompts.jsonl")
    of_first = [row for row in rows if row["data_source"] == SOURCES[0]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_first))
    both = [argument for argument in arguments if argument.startswith("teachers.")]
    rest = [argument for argument in arguments if argument not in both]
    runs = {
        "alone": (*rest, f"teacher.path={tmp_path / SOURCES[0]}"),
        "first": (*both, *rest),
        "second": (*reversed(both), *rest),
        "read again": (*both, *rest, "teachers_in_memory=one"),
    }
    for name, arguments in runs.items():
        finish(in_folder(arguments, tmp_path / name), tmp_path / f"{name}.log")
    for name in runs:
        assert_same_export(tmp_path / name, tmp_path / "alone")
        of_teacher = {key for row in metrics(tmp_path / name) for key in row if key.startswith("teacher/")}
        one, alone = (
            [{key: value for key, value in row.items() if key not in of_teacher} for row in metrics(tmp_path / folder)]
            for folder in (name, "alone")
        )
        assert one == alone, name


def test_a_student_learns_from_itself_given_a_hint(tmp_path):
    """The teacher is the student's own start, which reads the answer first: there is something to learn. Without a hint
    of its own there is nothing, exactly."""
    arguments = prompt_run(tmp_path, 3, *ALONE, **LAYERS)
    student = tmp_path / "student"
    arguments.append(f"teacher.path={student}")
    hinted = [*in_folder(arguments, tmp_path / "hinted"), f"data.teacher_prompt_key={HINTED}"]
    finish(hinted, tmp_path / "hinted.log")
    rollouts = assert_first_step_is_the_reference(hinted, tmp_path / "hinted", student, student)
    for rollout in rollouts:
        own, of_teacher = (byte_tokenizer().decode(ids) for ids in (rollout.prompt_ids, rollout.teacher_prompt_ids))
        assert re.sub(r"It is \d\. ", "", of_teacher) == own != of_teacher
    rows = metrics(tmp_path / "hinted")
    assert all(row["loss"] > 1e-3 for row in rows)
    for step in (1, 2, 3):
        written = read_lines(tmp_path / "hinted" / "rollouts" / f"step_{step:07d}.jsonl")
        assert len(written) == 4 and not any("It is" in row["prompt"] for row in written)
    finish(in_folder(arguments, tmp_path / "plain"), tmp_path / "plain.log")
    first = metrics(tmp_path / "plain")[0]
    assert first["loss"] == first["grad_norm"] == first["output/reverse_kl"] == 0.0


@pytest.mark.parametrize("tied", [False, True])
def test_the_export_has_the_trained_head(tied, tmp_path):
    settings = ("loss.output.objective=sampled", "rollout.temperature=0.9", "loss.output.metrics_every=2")
    arguments = prompt_run(tmp_path, 3, *settings, tie_word_embeddings=tied, **LAYERS)
    finish(arguments, tmp_path / "log")
    before, after = (tensors(folder) for folder in (tmp_path / "student", tmp_path / "run" / "hf"))
    assert [name for name, tensor in before.items() if torch.equal(tensor, after[name])] == []
    assert tied == torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    AutoTokenizer.from_pretrained(tmp_path / "run" / "hf")
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows if "output/reverse_kl" in row] == [1, 2, 3]
    assert all({"loss", "output/loss", "output/num_tokens", "rep/mse"} <= row.keys() for row in rows)
    assert all(row["loss"] == row["rep/mse"] + row["output/loss"] for row in rows)


def test_a_dry_run_describes_every_teacher(tmp_path):
    arguments = prompt_run(tmp_path, 3, "loss.output.objective=topk_kl", sources=SOURCES, **LAYERS)
    log = run(tmp_path, "train", *arguments, "--dry-run").stdout
    for source in SOURCES:
        assert f"teacher {source} " in log and f"teacher {source} up to layer" in log and f"layers {source} " in log
    assert "fits " in log
    assert not (tmp_path / "run").exists()


def test_a_layout_changes_nothing_that_a_user_sees(tmp_path):
    settings = (*ALONE[1:], "loss.output.direction=jsd", "optimizer.name=sgd", "optimizer.lr=0.1")
    arguments = prompt_run(tmp_path, 3, *settings, sources=SOURCES, **LAYERS)
    layout = ("parallel.tensor=2", "parallel.sequence=true")
    for name, world, overrides in (("one", 1, ()), ("many", 2, layout)):
        finish([*in_folder(arguments, tmp_path / name), *overrides], tmp_path / f"{name}.log", world_size=world)
    one, many = (metrics(tmp_path / name) for name in ("one", "many"))
    for key in ("loss", "grad_norm", "output/loss", "output/reverse_kl", "output/student_mass", "output/num_tokens"):
        assert [row[key] for row in many] == pytest.approx([row[key] for row in one], rel=1e-5), key
    rollouts = "rollouts/step_0000003.jsonl"
    assert (tmp_path / "many" / rollouts).read_text() == (tmp_path / "one" / rollouts).read_text()
    exported = [tensors(tmp_path / name / "hf") for name in ("one", "many")]
    for name, expected in exported[0].items():
        torch.testing.assert_close(exported[1][name], expected, rtol=1e-4, atol=1e-5)
