"""The demo: make a tiny teacher-student pair, distil, export, evaluate before and after.

`demo=same_architecture` (the default) converts both models first; the other kinds fit a bridge first.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from examples.demo.make_bridge_pair import KINDS, make_bridge_pair
from examples.demo.make_pair import TargetMissed, make_pair
from megatron_oprd import train
from megatron_oprd.bridge import fit
from megatron_oprd.config import Config, load_config
from megatron_oprd.evaluate import evaluate_model
from megatron_oprd.evaluation.scores import score
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import start_process
from megatron_oprd.runtime import platform
from megatron_oprd.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SAME = "same_architecture"
RECIPE = ROOT / "examples" / "demo.yaml"  # of SAME
PLACEHOLDERS = ["student.path=pair", "teacher.path=pair", "data.prompts=[pair]"]


def run_demo(overrides: list[str]) -> int:
    """Run the demo with the recipe's keys overridden; `train.seed` also seeds the pair, `demo=KIND` says which.
    Collective over the world.

    Without `train.run_dir` each run has a folder of its own below `runs/`.
    """
    begin = time.time()
    torch.set_num_threads(1)  # at this size a second thread costs more than it gives
    kind, overrides = _kind(overrides)
    recipe = RECIPE if kind == SAME else ROOT / "examples" / f"demo_{kind}.yaml"
    if any(not argument or argument.startswith("-") for argument in overrides):
        raise UserError(f"the demo takes key=value arguments, not {overrides}; see the head of run_oprd_qwen.sh")
    given = load_config(recipe, [*PLACEHOLDERS, *overrides])
    start_process(platform.choose_device(given.train.device))
    folder = on_rank_zero(lambda: _new_folder(given, overrides))
    pair = folder / "pair"
    on_rank_zero(
        lambda: make_and_convert(pair, given.train.seed) if kind == SAME else make_unlike(pair, kind, given.train.seed)
    )
    student, teacher = (pair / (f"{name}-megatron" if kind == SAME else name) for name in ("student", "teacher"))
    paths = [
        f"student.path={student}",
        f"teacher.path={teacher}",
        f"data.prompts=[{pair / 'train.jsonl'}]",
        f"evaluation.data=[{pair / 'heldout.jsonl'}]",
        f"train.run_dir={folder}",
    ]
    arguments = [*overrides, *paths]
    if kind != SAME:
        fit.main(["--config", str(recipe), *arguments])
        rank = Path(str(given.loss.representation.bridge)).name  # which of the ranks the recipe trains with
        arguments.append(f"loss.representation.bridge={folder / 'bridge' / rank}")
    train.main(["--config", str(recipe), *arguments])
    models = {"student before": pair / "student", "student after": folder / "hf", "teacher": pair / "teacher"}
    accuracies = {name: [_accuracy(recipe, path, t, arguments) for t in (0.0, 0.7)] for name, path in models.items()}
    on_rank_zero(lambda: _print(accuracies, folder, time.time() - begin))
    return 0


def _kind(overrides: list[str]) -> tuple[str, list[str]]:
    """What `demo=` asks for, and the other arguments."""
    named = [argument.removeprefix("demo=") for argument in overrides if argument.startswith("demo=")]
    kind = named[-1] if named else SAME
    if kind not in (SAME, *KINDS):
        raise UserError(f"demo={kind}: there are {', '.join((SAME, *KINDS))}")
    return kind, [argument for argument in overrides if not argument.startswith("demo=")]


def _new_folder(given: Config, overrides: list[str]) -> Path:
    folder = Path(given.train.run_dir)
    if any(override.startswith("train.run_dir=") for override in overrides):
        return folder
    return folder.with_name(f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


def make_unlike(pair: Path, kind: str, seed: int) -> None:
    """Two models that only a bridge can compare, in Hugging Face format."""
    if (pair / "validation.jsonl").exists():
        return  # an interrupted run goes on with its pair
    print("making the teacher-student pair", flush=True)
    try:
        make_bridge_pair(kind, pair, seed, steps=2000)
    except TargetMissed as error:
        raise UserError(f"the pair could not be made ({error}); use another train.seed") from None


def make_and_convert(pair: Path, seed: int) -> None:
    """Both models in Hugging Face format, then both as Megatron checkpoints by the converter's command."""
    if (pair / "teacher-megatron").exists() and (pair / "student-megatron").exists():
        return  # an interrupted run goes on with its pair
    print("making the teacher-student pair", flush=True)
    try:
        make_pair(pair, seed, steps=1000)
    except TargetMissed as error:
        raise UserError(f"the pair could not be made ({error}); use another train.seed") from None
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    tool = ROOT / "tools" / "checkpoint_convert" / "hf_to_megatron.py"
    for name in ("student", "teacher"):
        command = [sys.executable, str(tool), "--hf", str(pair / name), "--megatron", str(pair / f"{name}-megatron")]
        if (code := subprocess.run(command, env=alone, check=False).returncode) != 0:
            raise UserError(f"the conversion of {pair / name} ended with exit code {code}")


def _accuracy(recipe: Path, model: Path, temperature: float, arguments: list[str]) -> float:
    """Exact-match accuracy on the held-out additions, sampled by the embedded engine in the run's layout."""
    settings = [f"student.path={model}", f"evaluation.temperature={temperature}", "evaluation.top_p=1.0"]
    samples, _ = evaluate_model(load_config(recipe, [*arguments, *settings]))
    return score(samples, 1)["avg@1"]


def _print(accuracies: dict[str, list[float]], folder: Path, seconds: float) -> None:
    table = Table("model", "greedy", "temperature 0.7", title="Accuracy on held-out 3-digit additions")
    for name, values in accuracies.items():
        table.add_row(name, *(f"{100 * value:.1f} %" for value in values))
    Console().print(table)
    print(f"exported student: {folder / 'hf'}")
    print(f"the whole demo took {seconds:.0f} s")
    print(f"report: {folder / 'report.html'}", flush=True)
