"""The training command on one GPU: generation in bf16, student and teacher in FP8, and resuming from a checkpoint."""

import json
import shutil
from unittest import mock

import pytest

from megatron_oprd import train
from megatron_oprd.launch import setup
from tests.gpu.conftest import machine
from tests.helpers.runs import prompt_run

STEPS = 3
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_hidden_layers": 4,
    "initializer_range": 0.05,
}
SETTINGS = (
    "precision.dtype=bf16",
    "precision.fp8=hybrid",
    "precision.teacher_fp8=weights",
    "optimizer.schedule=constant",
    "optimizer.warmup_fraction=0",
    "evaluation.every=0",
    "checkpoint.every=1",
    "checkpoint.keep=9",
)


def trained(arguments, run_dir):
    """Train, and return the loss and gradient norm of every step."""
    with mock.patch.object(setup, "find_machine", machine):
        assert train.main([*arguments, f"train.run_dir={run_dir}"]) == 0
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def test_a_resumed_run_continues_as_the_uninterrupted_one(tmp_path, gpu):
    arguments = prompt_run(tmp_path, STEPS, *SETTINGS, **SIZES)
    uninterrupted = trained(arguments, tmp_path / "run")
    assert len(uninterrupted) == STEPS and uninterrupted[-1][0] < 0.9 * uninterrupted[0][0]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["attention"] == "Transformer Engine"
    assert (tmp_path / "run" / "hf" / "model.safetensors").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step_{STEPS:07d}")
    resumed = trained(arguments, tmp_path / "resumed")
    first, kept = (tmp_path / run / "checkpoints" / "step_0000001" / "complete" for run in ("run", "resumed"))
    assert first.stat().st_mtime_ns == kept.stat().st_mtime_ns, "it began anew"
    assert resumed[:-1] == uninterrupted[:-1]
    # Step 3 again, from the checkpoint of step 2. Backward adds up in no fixed order on a GPU.
    assert resumed[-1][0] == pytest.approx(uninterrupted[-1][0], rel=1e-4)
    assert resumed[-1][1] == pytest.approx(uninterrupted[-1][1], rel=1e-2)
