"""`plan`, which is `train --dry-run`, says whether a run fits, what it would run, and its memory and time."""

import json
import os
import subprocess
import sys

import pytest

from megatron_oprd.config import load_config
from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.commands import run, run_ranks
from tests.helpers.runs import VOCAB_SIZE, in_folder, prompt_run, replay_run


def test_a_dry_run_prints_the_run_and_writes_nothing(tmp_path):
    arguments = prompt_run(tmp_path / "run", 1, num_hidden_layers=2)
    (tmp_path / "output").mkdir()
    outcome = run(tmp_path / "output", "train", *in_folder(arguments, tmp_path / "dry"), "--dry-run")
    assert (outcome.code, outcome.stderr) == (0, "")
    first, *lines = outcome.stdout.splitlines()
    assert first.startswith("fits ") and "this machine (CPU" in first
    # Paths are not broken: below its heading, a longer line is a single word.
    assert len(lines) < 40 and all(len(line) <= 100 or len(line[11:].split()) == 1 for line in lines)
    for words in (
        "student 1, 2 of 2 from teacher 1, 2 of 2",
        "(Qwen3, ",
        "rollout.max_new_tokens=6",
        "during rollouts",
        "4 rows of 29 tokens",
        "rates of this CPU",
    ):
        assert words in " ".join(outcome.stdout.split())
    refused = run(tmp_path / "output", "train", *in_folder(arguments, tmp_path / "dry"), "--device", "h100")
    assert refused.code == 2 and "--device and --details belong to a plan" in refused.stderr
    options = ("evaluation.every=7", "evaluation.max_new_tokens=10", "--dry-run", "--details", "--device", "h100")
    detailed = run(tmp_path / "output", "train", *in_folder(arguments, tmp_path / "dry"), *options)
    assert (detailed.code, detailed.stderr) == (0, "")
    text = " ".join(detailed.stdout.split())
    for words in (
        "of 80.0 GB",
        "an H100 SXM",
        "student layer teacher layer pipeline stage",
        "a step on 1 x H100 SXM (estimated, not measured)",
        "Generation: 16,000 tokens/s; replicas: 1, rows of each: 4; at least 125 us for a layer and token, measured",
        "A step: 0.0 s = rollouts 0.0 s + training 0.0 s",
        "during evaluations",
        "10 rows of 33 tokens",
        "beside it an evaluation every 7 steps: the student answers in ",
    ):
        assert words in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "run"]


def test_of_several_processes_only_one_prints_and_none_waits(tmp_path):
    """A single process that plans for the same number of processes prints the same."""
    arguments = replay_run(tmp_path, 1, num_hidden_layers=4)
    student = save(random_hf_model("Qwen3Moe", vocab_size=VOCAB_SIZE, num_hidden_layers=4), tmp_path / "experts")
    sizes = ("pipeline=2", "virtual_pipeline=2", "context=2", "expert=2")
    layout = [f"parallel.{size}" for size in sizes] + ["teacher.parallel={tensor: 2}", "checkpoint.every=0"]
    arguments += [f"student.path={student}", *layout, "--dry-run", "--details"]
    outcomes = run_ranks(4, tmp_path, "train", *arguments, timeout_seconds=400)
    assert [(outcome.code, outcome.stderr) for outcome in outcomes] == [(0, "")] * 4
    first, *others = (outcome.stdout for outcome in outcomes)
    assert others == [""] * 3 and not (tmp_path / "run").exists()
    rows = [line.split()[-3:] for line in first.splitlines() if ", chunk " in line]
    assert [" ".join(row) for row in rows] == ["0, chunk 0", "1, chunk 0", "0, chunk 1", "1, chunk 1"]
    for words in (
        "its hidden states are computed in its own layout, then sent",
        "(Qwen3Moe, ",
        "teacher up to layer 4 of 4",
        "memory of a process in an update, GB",
        "a step on 4 x H100 SXM (estimated, not measured)",
        "planned for an H100 SXM: this machine has no GPU",
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
        assert line in " ".join(outcome.stdout.split())
    long = run_ranks(1, tmp_path, "train", *arguments, "data.max_prompt_tokens=91", "--dry-run")[0]
    assert long.code == 2 and "rollout.max_new_tokens=6 (97 tokens)" in long.stderr
    trained = run_ranks(1, tmp_path, "train", *arguments)[0]
    assert trained.code == 2 and "model.safetensors" in trained.stderr
    (tmp_path / "teacher" / "config.json").unlink()
    broken = run_ranks(1, tmp_path, "train", *arguments, "--dry-run")[0]
    assert broken.code == 2 and "cannot read" in broken.stderr and "config.json" in broken.stderr


def dry_peaks(arguments, folder, world=1):
    """Return the predicted GB of a process by group of ranks."""
    outcome = run_ranks(1, folder, "train", *arguments, "--dry-run", environment={"WORLD_SIZE": str(world)})[0]
    assert (outcome.code, outcome.stderr) == (0, "")
    return peaks_of(outcome.stdout)


def peaks_of(plan):
    """Return the sums of the memory table in the text of a plan, by group of ranks."""
    table = plan[plan.index("memory of ") :].splitlines()
    rows = [line.split() for line in table if len(line.split()) == 9 and line.strip()[0].isdigit()]
    return {row[0]: float(row[-1]) for row in rows}


def test_every_pipeline_rank_has_a_row(tmp_path):
    arguments = replay_run(tmp_path, 1, "parallel.pipeline=2", num_hidden_layers=3, vocab_size=40000)
    peaks = dry_peaks(arguments, tmp_path, world=4)
    assert list(peaks) == ["0-1", "2-3"]
    assert all(peak > 0 for peak in peaks.values())


@pytest.mark.nightly
def test_training_chooses_for_each_pipeline_rank_and_says_so_once(tmp_path):
    """The limit is far below what the processes need, so that the strongest recomputation is taken."""
    settings = ("parallel.pipeline=2", "recompute=auto", "batch.max_tokens_per_micro_batch=auto", "memory.limit_gb=0.1")
    arguments = replay_run(tmp_path, 1, *settings, num_hidden_layers=4)
    outcomes = run_ranks(2, tmp_path, "train", *arguments, timeout_seconds=600)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    (line,) = [line for line in outcomes[0].stdout.splitlines() if line.startswith("auto: ")]
    assert "pipeline rank 1: recompute " in line and "no other choice needs less" in line
    assert "auto: " not in outcomes[1].stdout
    used = load_config(tmp_path / "run" / "config.yaml", [])
    assert [stage.blocks > 0 for stage in used.recompute.stages] == [True, True]
    assert used.batch.max_tokens_per_micro_batch <= 32


SIZES = {"tiny": (2, 64, 256, 64), "larger": (4, 512, 8192, 2048)}  # layers, width, vocabulary, tokens of an update


@pytest.mark.parametrize("name", ["tiny", pytest.param("larger", marks=pytest.mark.nightly)])
def test_the_predicted_peak_is_the_resident_memory_of_a_run(name, tmp_path):
    """Within 10 %, the tolerance of all predictions. The process itself has 0.4 GB of it, measured by the plan."""
    layers, width, vocabulary, tokens = SIZES[name]
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "vocab_size": vocabulary, "head_dim": 64}
    arguments = replay_run(
        tmp_path,
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
    (tmp_path / "replay.jsonl").write_text(f"{json.dumps(rollout)}\n" * 8)
    arguments.append("rollout.prompts_per_step=4")
    predicted, measured = plan_and_train(arguments, tmp_path)
    assert predicted == pytest.approx(measured / 1e9, rel=0.1)


def plan_and_train(arguments, folder):
    """Return the GB that a new process predicts, and the most resident bytes of the same process in training.

    oneDNN keeps few compiled kernels: docs/results/plans.md says why.
    """
    both = "import sys; from megatron_oprd.train import main; main([*sys.argv[1:], '--dry-run']); main(sys.argv[1:])"
    command = [sys.executable, "-c", both, *arguments]
    environment = {**os.environ, "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (predicted,) = peaks_of(done.stdout).values()
    last = (folder / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    return predicted, json.loads(last)["memory/peak_bytes"]
