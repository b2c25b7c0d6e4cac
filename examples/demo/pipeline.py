"""The steps of the demo: make a tiny teacher-student pair, distil, export, evaluate before and after.

The demos whose models have one architecture first convert both to Megatron checkpoints; the others first fit a bridge.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from examples.demo.hybrid import make_hybrid
from examples.demo.make_bridge_pair import make_bridge_pair
from examples.demo.make_pair import TargetMissed, make_pair
from examples.demo.run import EXAMPLES, HYBRID, SAME_ARCHITECTURE, DemoRun, run_folder
from megatron_oprd import train
from megatron_oprd.bridge import fit
from megatron_oprd.config import load_config
from megatron_oprd.evaluate import evaluate_model
from megatron_oprd.evaluation.scores import score
from megatron_oprd.launch.evaluation_inputs import read_evaluation_inputs
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import start_process
from megatron_oprd.runtime import platform
from megatron_oprd.types import UserError


def run_pipeline(run: DemoRun) -> None:
    """Run all steps and print the table of accuracies. Collective over the world."""
    begin = time.time()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)  # at this size a second thread costs more than it gives
    config, recipe = run.config, run.recipe
    start_process(platform.choose_device(config.train.device))
    folder = on_rank_zero(lambda: run_folder(run))
    pair = folder / "pair"
    same_architecture = run.kind in (SAME_ARCHITECTURE, HYBRID)
    on_rank_zero(
        lambda: (
            make_and_convert(pair, config.train.seed, hybrid=run.kind == HYBRID)
            if same_architecture
            else make_unlike(pair, run.kind, config.train.seed)
        )
    )
    student, teacher = (pair / (f"{name}-megatron" if same_architecture else name) for name in ("student", "teacher"))
    paths = [
        f"student.path={student}",
        f"teacher.path={teacher}",
        f"data.prompts=[{pair / 'train.jsonl'}]",
        f"evaluation.data=[{pair / 'heldout.jsonl'}]",
        f"train.run_dir={folder}",
    ]
    arguments = [*run.overrides, *paths]
    if not same_architecture:
        fit.main(["--config", str(recipe), *arguments])
        rank = Path(str(config.loss.representation.bridge)).name  # the folder of the rank that the recipe trains with
        arguments.append(f"loss.representation.bridge={folder / 'bridge' / rank}")
    train.main(["--config", str(recipe), *arguments])
    if not on_rank_zero((folder / "hf").exists):
        return  # a signal ended the training; the same command continues it
    models = {"student before": pair / "student", "student after": folder / "hf", "teacher": pair / "teacher"}
    accuracies = {name: [_accuracy(recipe, path, t, arguments) for t in (0.0, 0.7)] for name, path in models.items()}
    on_rank_zero(lambda: _print(accuracies, folder, time.time() - begin))


def make_unlike(pair: Path, kind: str, seed: int) -> None:
    """Make two models that only a bridge can compare, in Hugging Face format.

    Does nothing if the pair exists. Raises UserError if a model does not learn.
    """
    if (pair / "validation.jsonl").exists():
        return  # an interrupted run continues with its pair
    print("making the teacher-student pair", flush=True)
    try:
        make_bridge_pair(kind, pair, seed, steps=2000)
    except TargetMissed as error:
        raise UserError(f"the pair could not be made ({error}); use another train.seed") from None


def make_and_convert(pair: Path, seed: int, *, hybrid: bool = False) -> None:
    """Make both models in Hugging Face format, then convert them to Megatron checkpoints by the converter's command.

    Does nothing if both checkpoints exist. Raises UserError if a model does not learn or a conversion fails.
    """
    if (pair / "teacher-megatron").exists() and (pair / "student-megatron").exists():
        return  # an interrupted run continues with its pair
    print("making the teacher-student pair", flush=True)
    try:
        make_pair(pair, seed, steps=1000)
        if hybrid:
            make_hybrid(pair, seed)
    except TargetMissed as error:
        raise UserError(f"the pair could not be made ({error}); use another train.seed") from None
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    tool = EXAMPLES.parent / "tools" / "checkpoint_convert" / "hf_to_megatron.py"
    commands = {
        name: [sys.executable, str(tool), "--hf", str(pair / name), "--megatron", str(pair / f"{name}-megatron")]
        for name in ("student", "teacher")
    }
    # At the same time: each process spends most of its time on imports.
    processes = {name: subprocess.Popen(command, env=alone) for name, command in commands.items()}
    for name, code in {name: process.wait() for name, process in processes.items()}.items():
        if code != 0:
            raise UserError(f"the conversion of {pair / name} ended with exit code {code}")


def _accuracy(recipe: Path, model: Path, temperature: float, arguments: list[str]) -> float:
    """Return the exact-match accuracy on the held-out additions, sampled by the embedded engine in the run's layout."""
    settings = [f"student.path={model}", f"evaluation.temperature={temperature}", "evaluation.top_p=1.0"]
    samples = evaluate_model(read_evaluation_inputs(load_config(recipe, [*arguments, *settings]))).samples
    return score(samples, 1)["avg@1"]


def _print(accuracies: dict[str, list[float]], folder: Path, seconds: float) -> None:
    table = Table("model", "greedy", "temperature 0.7", title="Accuracy on held-out 3-digit additions")
    for name, values in accuracies.items():
        table.add_row(name, *(f"{100 * value:.1f} %" for value in values))
    Console().print(table)
    print(f"student: {folder / 'hf'}")
    print(f"time: {seconds:.0f} s")
    print(f"report: {folder / 'report.html'}", flush=True)
