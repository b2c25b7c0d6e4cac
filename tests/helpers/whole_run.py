"""A complete `train`, killed and resumed, with a teacher in FP8, export and evaluation, for a GPU and a CPU."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.helpers.killable import DieBefore
from tests.helpers.runs import complete_steps, in_folder, prompt_run, read_lines

STEPS = 4
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 4}
SETTINGS = (
    "precision.dtype=bf16",
    "precision.teacher_fp8=weights",
    "evaluation.every=2",
    "optimizer.schedule=constant",
    "optimizer.warmup_fraction=0",
)
# (arguments of train, file for its output, where it kills itself) -> exit code
Start = Callable[[list[str], Path, DieBefore | None], int]


def check_whole_run(folder: Path, start: Start) -> dict[str, object]:
    """Assert that a killed and resumed run ends as an uninterrupted one. Return `environment.json` of the run.

    `start` runs `train` in a process of its own.
    """
    arguments = prompt_run(folder, STEPS, *SETTINGS, **SIZES)
    expected, resumed, log = folder / "run", folder / "resumed", folder / "log"
    assert start(arguments, log, None) == 0, log.read_text()
    again = in_folder(arguments, resumed)
    code = start(again, log, DieBefore("open", r"/step_0000004.*state\.json"))
    assert code == -signal.SIGKILL and complete_steps(resumed) == [2], log.read_text()
    assert start(again, log, None) == 0, log.read_text()
    assert f"continuing from {resumed / 'checkpoints' / 'step_0000002'}" in log.read_text()
    assert complete_steps(resumed) == complete_steps(expected) == [2, 4]
    rows, wanted = (read_lines(run / "metrics.jsonl") for run in (resumed, expected))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    # Backward adds up in no fixed order on a GPU, and an answer of another length changes the loss of its step.
    assert [row["loss"] for row in rows[:2]] == pytest.approx([row["loss"] for row in wanted[:2]], rel=1e-3)
    for run in (expected, resumed):
        scored = [(row["step"], row["name"]) for row in read_lines(run / "evaluations.jsonl")]
        assert scored == [(0, "before"), (2, "step 2"), (4, "after")]
        model = AutoModelForCausalLM.from_pretrained(run / "hf")
        with torch.no_grad():
            assert model(torch.arange(8)[None]).logits.isfinite().all()
    return json.loads((resumed / "environment.json").read_text())
