"""Time training steps of `megatron_oprd.train` with each rollout engine, at `rollout.ahead` 0 and 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollout_workloads import Shape
from tests.helpers.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, SAMPLES, NEW_TOKENS = 8, 2, 128  # of a step
METRICS = ("time/step", "time/rollout", "sync/seconds")


def time_training(
    shape: Shape, folder: Path, engines: dict[str, Sequence[str]], steps: int, threads: int
) -> list[dict[str, Any]]:
    """Return a row per engine and value of `rollout.ahead`: the seconds of each step between the first and the last.

    The first step builds what later ones use. With `rollout.ahead: 1` it also generates twice, and the last not at all.

    Args:
        engines: the settings of each engine, by its name.
        steps: steps of a run.
    """
    settings = make_inputs(shape, folder)
    rows = []
    for name, own in engines.items():
        for ahead in (0, 1):
            run_dir = folder / f"run-{len(rows)}"
            more = [*settings, *own, f"rollout.ahead={ahead}", f"train.steps={steps}", f"train.run_dir={run_dir}"]
            rows.append({"engine": name, "ahead": ahead, **run(more, run_dir, threads)})
    return rows


def make_inputs(shape: Shape, folder: Path) -> list[str]:
    """Save a random student and teacher and prompts; return the settings that name them."""
    for seed, name in enumerate(("student", "teacher")):
        shape.build(torch.device("cpu"), seed).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} + {n + 1} = "}) + "\n" for n in range(4 * PROMPTS)))
    return [
        *(f"{name}.path={folder / name}" for name in ("student", "teacher")),
        f"data.prompts=[{prompts}]",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.samples_per_prompt={SAMPLES}",
        f"rollout.max_new_tokens={NEW_TOKENS}",
        f"precision.dtype={shape.dtype}",
        "checkpoint.every=0",
        "checkpoint.export_hf=false",
    ]


def run(settings: Sequence[str], run_dir: Path, threads: int) -> dict[str, Any]:
    """Run a training and return the times of its middle steps, or the last line of its error as `note`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "megatron_oprd.train", *settings]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        return {"note": f"failed: {(result.stderr.strip().splitlines() or ['no message'])[-1][:200]}"}
    steps = [json.loads(one) for one in (run_dir / "metrics.jsonl").read_text().splitlines()][1:-1]
    return {"note": "", **{name: [step[name] for step in steps if name in step] for name in METRICS}}
