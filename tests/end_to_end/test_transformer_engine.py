"""Layouts and whole runs on Transformer Engine's modules: Megatron-Core's own, over a stand-in for the library that
runs on a CPU (tests/numerics/test_te_stand_in.py and tests/unit/test_te_contract.py hold that to the real one)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import to_megatron
from tests.helpers.runs import prompt_run

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "helpers" / "te_on_cpu"
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{STAND_IN}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
CASES = [
    "4-qwen2-tp2-sp-selective-teacher-pp4",
    "4-qwen3-pp2-cp2-vp2-uniform1-unpacked-teacher-tp4",
    "4-moe-tp2-cp2-sp-ep2-distopt-uniform2-unpacked-teacher-tp4-middle-4of6-tied-reverse-warm",
    "4-qwen3-tp4-uniform1-teacher-dp-6of4-bridge-wide-reverse",
]
# FP8 wants widths that are multiples of 16 on each rank.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 4, "initializer_range": 0.05}
SETTINGS = (
    "precision.dtype=bf16",
    "optimizer.schedule=constant",
    "optimizer.warmup_fraction=0",
    "evaluation.every=0",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "parallel.tensor=2",
    "parallel.sequence=true",
)
IN_FP8 = ("precision.fp8=hybrid", "precision.teacher_fp8=weights")
STEPS = 3


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    output = tmp_path_factory.mktemp("te") / "failures.json"
    command = [sys.executable, "-W", "ignore", "-m", "tests.helpers.te_layouts", str(output), *CASES]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(output.read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_update_is_the_references(case, failures):
    failure, details = failures[case]
    assert failure is None, f"{failure}\n{details}"


def train(arguments, run_dir, *settings):
    """Train on two ranks; return the metrics by step and the output."""
    launch = [sys.executable, "-W", "ignore", "-m", "tests.helpers.te_train", "2"]
    command = [*launch, *arguments, *settings, f"train.run_dir={run_dir}"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: one[name] for name in ("loss", "grad_norm", "rep/cosine")} for one in lines], result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the arguments of a run, and the run itself in FP8."""
    folder = tmp_path_factory.mktemp("runs")
    arguments = prompt_run(folder, STEPS, *SETTINGS, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.bfloat16)
    model.save_pretrained(folder / "teacher")  # in the dtype of the run: FP8 is made of the same numbers wherever from
    return folder, arguments, train(arguments, folder / "fp8", *IN_FP8)


def stopped_after_two_steps(runs, name):
    folder, _, _ = runs
    shutil.copytree(folder / "fp8", folder / name)
    shutil.rmtree(folder / name / "checkpoints" / f"step_{STEPS:07d}")
    return folder / name


def test_a_run_in_fp8_names_its_modules_and_learns(runs):
    folder, _, (metrics, printed) = runs
    environment = json.loads((folder / "fp8" / "environment.json").read_text())
    assert environment["attention"] == "Transformer Engine"
    assert environment["packages"]["transformer-engine"] == "2.11.0"
    assert "transformer-engine 2.11.0" in printed and "attention by Transformer Engine" in printed
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]


def test_fp8_weights_follow_every_update(runs):
    """A run that resumes rounds its weights anew; with FP8 weights from before an update, its metrics would differ."""
    _, arguments, (metrics, _) = runs
    assert train(arguments, stopped_after_two_steps(runs, "resumed"), *IN_FP8)[0] == metrics


@pytest.mark.nightly
def test_a_checkpoint_resumes_without_transformer_engine(runs):
    _, arguments, (metrics, _) = runs
    own, _ = train(arguments, stopped_after_two_steps(runs, "own"), "precision.attention=sdpa")
    assert own[:2] == metrics[:2] and own[2] != metrics[2]
    assert own[2]["loss"] == pytest.approx(metrics[2]["loss"], rel=0.1)
    assert own[2]["grad_norm"] == pytest.approx(metrics[2]["grad_norm"], rel=0.15)


@pytest.mark.nightly
def test_fp8_weights_are_the_same_from_either_kind_of_folder(runs):
    folder, arguments, (metrics, _) = runs
    run_distributed(1, to_megatron, folder / "teacher", folder / "megatron-teacher", 1, torch.bfloat16)
    first, _ = train(
        arguments, folder / "other", *IN_FP8, f"teacher.path={folder / 'megatron-teacher'}", "train.steps=1"
    )
    assert first == metrics[:1]


@pytest.mark.nightly  # a run with our own FP8 weights in place of the stand-in's: tests/distributed/test_fp8_teacher.py
def test_automatic_fp8_of_the_teacher_begins_after_step_1(runs):
    folder, arguments, _ = runs
    _, printed = train(arguments, folder / "auto", "precision.teacher_fp8_share=1.0")
    assert "FP8 weights from step 2 on" in printed
    state = json.loads((folder / "auto" / "checkpoints" / "step_0000001" / "state.json").read_text())
    assert state["teacher_in_fp8"] is True
