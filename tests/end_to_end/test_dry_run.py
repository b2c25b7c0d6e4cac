"""`train --dry-run` prints the models, layouts, memory and time of a run, and predicts the memory that a run needs."""

import json
import os
import subprocess
import sys

import pytest

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.commands import run, run_ranks
from tests.helpers.memory import HONEST
from tests.helpers.runs import VOCAB_SIZE, in_folder, prompt_run, replay_run

GIB = 2**30


def test_a_dry_run_prints_the_run_and_writes_nothing(tmp_path):
    arguments = prompt_run(tmp_path / "run", 1, num_hidden_layers=2)
    (tmp_path / "output").mkdir()
    outcome = run(tmp_path / "output", "train", *in_folder(arguments, tmp_path / "dry"), "--dry-run")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert f"run_dir:{tmp_path / 'dry'}" in "".join(outcome.stdout.split())  # a long path begins a line of its own
    lines = " ".join(outcome.stdout.split())
    for words in (
        "Compared layers",
        "student: Qwen3ForCausalLM",
        "Memory, 1 processes",
        "KV cache: 4 rows of 29 tokens, 0.00 GB on the fullest rank",
        "Generation: 1,802 tokens/s; replicas: 1, rows of each: 4; at least 1,110 us for a layer and token, measured",
        "A step: 0.0 s = rollouts 0.0 s + training 0.0 s",
    ):
        assert words in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "run"]


def test_of_several_processes_only_one_prints_and_none_waits(tmp_path):
    """A single process that plans for the same number of processes prints the same."""
    arguments = replay_run(tmp_path, 1, num_hidden_layers=4)
    student = save(random_hf_model("Qwen3Moe", vocab_size=VOCAB_SIZE, num_hidden_layers=4), tmp_path / "experts")
    sizes = ("pipeline=2", "virtual_pipeline=2", "context=2", "expert=2")
    layout = [f"parallel.{size}" for size in sizes] + ["teacher.parallel={tensor: 2}", "checkpoint.every=0"]
    arguments += [f"student.path={student}", *layout, "--dry-run"]
    outcomes = run_ranks(4, tmp_path, "train", *arguments, timeout_seconds=400)
    assert [(outcome.code, outcome.stderr) for outcome in outcomes] == [(0, "")] * 4
    first, *others = (outcome.stdout for outcome in outcomes)
    assert others == [""] * 3 and not (tmp_path / "run").exists()
    rows = [line.split("│")[1:4] for line in first.splitlines() if ", chunk " in line]
    assert [row[2].strip() for row in rows] == ["0, chunk 0", "1, chunk 0", "0, chunk 1", "1, chunk 1"]
    for words in (
        "teacher: its hidden states are sent from its layout to the student's",
        "student: Qwen3MoeForCausalLM",
        "teacher: Qwen3ForCausalLM",
        "built up to layer 4 of 4",
        "Memory, 4 processes",
        "peak of an update",
        "A step on 4 x H100 SXM (estimated, not measured)",
    ):
        assert words in first
    alone = run_ranks(1, tmp_path, "train", *arguments, environment={"WORLD_SIZE": "4"})[0]
    assert (alone.code, alone.stdout) == (0, first)


def test_a_dry_run_needs_only_the_models_config_json(tmp_path):
    """A run without --dry-run still needs weights, tokenizers and prompts."""
    arguments = prompt_run(tmp_path, 1, "data.max_prompt_tokens=40", "checkpoint.every=0", num_hidden_layers=1)
    for model in ("student", "teacher"):
        for path in (tmp_path / model).iterdir():
            if path.name != "config.json":
                path.unlink()
    (tmp_path / "prompts.jsonl").unlink()
    outcome = run_ranks(1, tmp_path, "train", *arguments, "--dry-run")[0]
    assert (outcome.code, outcome.stderr) == (0, "")
    folder = str(tmp_path)
    for line in (
        f"no weights in {folder}/student, {folder}/teacher yet: they were not checked",
        f"no tokenizer in {folder}/student, no {folder}/prompts.jsonl yet: the longest prompt is taken to have "
        "data.max_prompt_tokens=40 tokens",
    ):
        assert line in outcome.stdout.splitlines()
    long = run_ranks(1, tmp_path, "train", *arguments, "data.max_prompt_tokens=91", "--dry-run")[0]
    assert long.code == 2 and "rollout.max_new_tokens=6 (97 tokens)" in long.stderr
    trained = run_ranks(1, tmp_path, "train", *arguments)[0]
    assert trained.code == 2 and "model.safetensors" in trained.stderr
    (tmp_path / "teacher" / "config.json").unlink()
    broken = run_ranks(1, tmp_path, "train", *arguments, "--dry-run")[0]
    assert broken.code == 2 and "cannot read" in broken.stderr and "config.json" in broken.stderr


def dry_peaks(arguments, folder, world=1):
    """Return the predicted GiB by group of ranks."""
    outcome = run_ranks(1, folder, "train", *arguments, "--dry-run", environment={"WORLD_SIZE": str(world)})[0]
    assert (outcome.code, outcome.stderr) == (0, "")
    table = outcome.stdout[outcome.stdout.index("Memory, ") :].splitlines()
    rows = [line.split() for line in table if line.strip()[:1].isdigit() and line.startswith(" ")]
    return {row[0]: float(row[-1]) for row in rows}


def test_every_pipeline_rank_has_a_row(tmp_path):
    arguments = replay_run(tmp_path, 1, "parallel.pipeline=2", num_hidden_layers=3, vocab_size=40000)
    peaks = dry_peaks(arguments, tmp_path, world=4)
    assert list(peaks) == ["0-1", "2-3"]
    assert all(peak > 0 for peak in peaks.values())


@pytest.mark.nightly
def test_the_predicted_peak_is_the_peak_of_a_run(tmp_path):
    """A tiny run is subtracted from both, because the process itself needs memory too."""
    predicted, measured = [], []
    for name, (layers, width, vocabulary, tokens) in {"tiny": (1, 64, 256, 16), "run": (4, 512, 8192, 2048)}.items():
        folder = tmp_path / name
        sizes = {"hidden_size": width, "intermediate_size": 3 * width, "vocab_size": vocabulary, "head_dim": 64}
        arguments = replay_run(
            folder,
            2,
            "loss.output.objective=full_kl",
            "loss.representation.positions=all",
            f"batch.max_tokens_per_micro_batch={tokens}",
            "checkpoint.every=0",
            "checkpoint.export_hf=false",
            num_hidden_layers=layers,
            **sizes,
        )
        rollout = {"prompt_ids": [1] * 4, "response_ids": [2] * (tokens // 4 - 4)}
        (folder / "replay.jsonl").write_text(f"{json.dumps(rollout)}\n" * 8)
        arguments.append("rollout.prompts_per_step=4")
        predicted += dry_peaks(arguments, folder).values()
        measured.append(peak_of_a_run(arguments, folder))
    assert predicted[1] - predicted[0] == pytest.approx((measured[1] - measured[0]) / GIB, rel=0.1)


def peak_of_a_run(arguments, folder):
    command = [sys.executable, "-m", "megatron_oprd.train", *arguments]
    subprocess.run(command, env={**os.environ, **HONEST, "OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
    last = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return json.loads(last)["memory/peak_bytes"]
