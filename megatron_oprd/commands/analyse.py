"""Compare a student with its teacher on the same rollouts: hidden states, their differences and gradients.

torchrun -m megatron_oprd analyse [RUN] [--config F] [a.b=1 ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_oprd.analysis.objectives import HIDDEN_STATES, OBJECTIVES
from megatron_oprd.config import Config, OptimizerConfig, load_config
from megatron_oprd.config.yaml_core import load_yaml
from megatron_oprd.evaluation.records import get, read_text
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command
from megatron_oprd.types import UserError

NONE = "none"
PARSER = command_parser(
    "analyse",
    "Compare a student with its teacher on the same rollouts: cosine and error by layer and position, directions of "
    "the difference, variance of the gradients, costs. RUN is the folder of a run: its exported student is compared, "
    "before and after the training. Without RUN, student.path and teacher.path are compared. Writes analysis/ into "
    "train.run_dir.",
    override="rollout.prompts_per_step=16",
)
PARSER.usage = "megatron-oprd analyse [-h] [RUN] [--before DIR] [--objectives NAMES] [--config FILE] [key=value ...]"
PARSER.add_argument(
    "--before", metavar="DIR", help="the student before its training; default with RUN: its student.path"
)
PARSER.add_argument(
    "--objectives",
    metavar="NAMES",
    help=f"whose gradients are measured, with commas: {', '.join(OBJECTIVES)}, or none. Default: all; hidden_states "
    "alone with a bridge",
)


def read_configuration(options: argparse.Namespace) -> Config:
    """Return the configuration of the analysis. The first argument without `=` is RUN. Raises UserError."""
    read_objectives(options)
    run, overrides = _run_and_overrides(options)
    if run is None:
        return load_config(options.config, overrides)
    file = run / "config.yaml" if options.config is None else Path(options.config)
    if not file.exists():
        raise UserError(f"no config.yaml in {run}; name the train.run_dir of a run, or student.path and teacher.path")
    if not (run / "hf").is_dir() and not any(one.startswith("student.path=") for one in overrides):
        raise UserError(
            f"{run} has no exported student ({run / 'hf'}); let the run end, or name a model: student.path=DIR"
        )
    paths = [f"train.run_dir={json.dumps(str(run))}", f"student.path={json.dumps(str(run / 'hf'))}"]
    return load_config(str(file), [*paths, *overrides])


def read_objectives(options: argparse.Namespace) -> list[str] | None:
    """Return the names of `--objectives`, or None without the option. Raises UserError for an unknown name."""
    if options.objectives is None:
        return None
    names = [name for name in options.objectives.split(",") if name != NONE]
    for name in names:
        if name not in OBJECTIVES:
            raise UserError(f"--objectives: unknown objective {name}; use {', '.join(OBJECTIVES)} or {NONE}")
    return list(dict.fromkeys(names))


def read_before(options: argparse.Namespace) -> str | None:
    """Return the folder of the student before its training, or None. Raises UserError if it does not exist."""
    run, _ = _run_and_overrides(options)
    folder = options.before
    if folder is None and run is not None:
        folder = get(load_yaml(read_text(run / "config.yaml")), "student", "path")
        return folder if isinstance(folder, str) and Path(folder).is_dir() else None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--before {folder}: no such folder; name a model, or leave the option out")
    return None if folder is None else str(folder)


def _run_and_overrides(options: argparse.Namespace) -> tuple[Path | None, list[str]]:
    overrides = list(options.overrides)
    number = next((place for place, argument in enumerate(overrides) if "=" not in argument), None)
    return (None if number is None else Path(overrides.pop(number))), overrides


if __name__ == "__main__":
    check_command_line(PARSER, read_configuration)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from rich import box
from rich.console import Console
from rich.table import Table

from megatron_oprd.analysis.before import check_before
from megatron_oprd.analysis.figures import draw_figures
from megatron_oprd.analysis.procedure import analyse
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import explain_os_errors, write_json, write_text

FILE = "analysis.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the command: build the models, analyse, print tables, write `analysis/` into the run folder."""
    options = PARSER.parse_args(arguments)
    config, before = read_configuration(options), read_before(options)
    objectives = read_objectives(options)
    if objectives is None:
        objectives = list(OBJECTIVES) if config.loss.representation.bridge is None else [HIDDEN_STATES]
    inputs = read_inputs(analysis_config(config, objectives))
    if before is not None:
        check_before(before, inputs.setup.student)
    folder = inputs.run_dir / "analysis"
    with guarded(inputs.config.watchdog, folder):
        progress.enter("loading")
        found = analyse(build_run(inputs, identifies=False), before, objectives)
        models = {"student": config.student.path, "teacher": config.named_teachers[""].path, "before": before}
        on_rank_zero(lambda: write_analysis(folder, {**models, **found}))
    return 0


def analysis_config(config: Config, objectives: list[str]) -> Config:
    """Return the configuration of a run from which both models are built, that never updates the student.

    Raises UserError for several teachers.
    """
    if config.teachers:
        raise UserError(
            f"analyse compares the student with one teacher, and teachers has {', '.join(config.teachers)}; name one "
            "as teacher.path and set teachers={}"
        )
    representation, output = config.loss.representation, config.loss.output
    needs_heads = any(name != HIDDEN_STATES for name in objectives)
    loss = config.loss.model_copy(
        update={
            "representation": representation.model_copy(
                update={"weight": representation.weight or 1.0, "train_bridge": False}
            ),
            "output": output.model_copy(update={"objective": "full_kl" if needs_heads else "none"}),
        }
    )
    engine = "replay" if config.rollout.engine == "replay" else "megatron"
    overlap = {"overlap_param_gather": False}
    return config.model_copy(
        update={
            "loss": loss,
            "optimizer": OptimizerConfig(name="sgd"),  # without state; it never steps
            "train": config.train.model_copy(update={"steps": 1}),
            "evaluation": config.evaluation.model_copy(update={"every": 0, "best": None, "patience": 0}),
            "rollout": config.rollout.model_copy(update={"engine": engine, "ahead": 0}),
            "parallel": config.parallel.model_copy(update=overlap),
            "logging": config.logging.model_copy(update={"wandb": type(config.logging.wandb)()}),
        }
    )


def write_analysis(folder: Path, found: Mapping[str, Any]) -> None:
    """Write analysis.json and the figures, and print the tables. One rank calls this."""
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, found)
    for name, text in draw_figures(found).items():
        write_text(folder / name, text)
    _print(found)
    print(f"written: {folder / FILE} and {len(list(folder.glob('*.svg')))} figures beside it", flush=True)


def _print(found: Mapping[str, Any]) -> None:
    console = Console()
    states = [name for name in ("before", "after") if name in found["positions"]]
    titles = [f"{what} {name}" for what in ("cosine", "error") for name in states]
    size = f"{found['rollouts']} rollouts, {found['tokens']:,} tokens"
    table = Table("layer", *titles, "directions of 90 %", title=f"Hidden states ({size})", box=box.SIMPLE)
    for number, directions in enumerate(found["directions"]):
        layers = [found["positions"][name][number] for name in states]
        values = [_text(layer[what]) for what in ("cosine", "relative_error") for layer in layers]
        table.add_row(str(directions["layer"]), *values, _ranks_of(directions["after"]))
    console.print(table)
    if found["gradients"]:
        columns = ("objective", "noise", "variance", "teacher s", "student s")
        table = Table(*columns, title="Gradients of the same rollouts", box=box.SIMPLE)
        for item in found["gradients"]:
            cost = item["cost"]
            seconds = (f"{cost[f'{part}_seconds']:.3g}" for part in ("teacher", "student"))
            table.add_row(item["objective"], _text(item["noise"]), _text(item["variance"]), *seconds)
        console.print(table)


def _ranks_of(curve: Mapping[str, Any]) -> str:
    """Return the least rank on the curve whose directions explain 90 % of the difference."""
    both = zip(curve["ranks"], curve["explained"], strict=True)
    return next((str(rank) for rank, explained in both if explained >= 0.9), "")


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    run_command(main)
