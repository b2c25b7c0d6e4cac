"""OPRD-Bridge, stage 1: what makes the layers of two unlike models comparable, fitted on the student's own answers.

torchrun -m megatron_oprd.bridge.fit --config F [a.b=1 ...]
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path

from megatron_oprd.config import Config, HealthConfig, OutputConfig, load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser(
    "bridge.fit",
    "Fit the bridge between a student and an unlike teacher.",
    override="bridge.ranks=[4,8]",
    config="YAML file; `bridge`, `rollout`, `data` and `loss.representation` are read",
)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.bridge.fitting.procedure import (
    Fitting,
    fit_adamw,
    fit_closed_form,
    gather_moments,
    generate,
    is_held_out,
    measure,
    merged,
    per_step,
    with_one_teacher_map,
)
from megatron_oprd.bridge.fitting.results import print_results, write_results
from megatron_oprd.bridge.fitting.rollouts import StoredRollouts
from megatron_oprd.bridge.fitting.solve import check_ranks
from megatron_oprd.bridge.origin import with_weight_hashes
from megatron_oprd.bridge.record import Origin
from megatron_oprd.hf.config import read_json
from megatron_oprd.launch.assemble import build_models
from megatron_oprd.launch.inputs import Inputs, read_inputs
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import explain_os_errors, write_json
from megatron_oprd.types import UserError

BEING_FITTED = "(being fitted)"  # in the place of the bridge: whatever needs one may run
WHICH_STATES = {"layers", "pairs", "positions", "k", "shift", "final_norm"}  # keys of loss.representation


def main(arguments: list[str] | None = None) -> int:
    """The command: rollouts of the student, moments of both models' states on them, maps, their cosines, files."""
    options = PARSER.parse_args(arguments)
    inputs = read_inputs(fitting_config(load_config(options.config, options.overrides)), fitting=True)
    check(inputs)
    with guarded(inputs.config.watchdog, inputs.run_dir):
        progress.enter("loading")
        fit(Fitting(inputs, build_models(inputs)))
    return 0


def fitting_config(config: Config) -> Config:
    """The configuration of a training run as the fit needs it: as many steps as give `bridge.prompts` prompts, and
    nothing of what comes after a fit. Raises UserError for several teachers and for a loss that reads no states."""
    if config.teachers:
        raise UserError("a bridge joins the student with one teacher; name it as teacher.path")
    if not config.loss.reads_layers:
        raise UserError("loss.representation.weight=0 compares no hidden states; a bridge needs some to be compared")
    representation = config.loss.representation.model_copy(update={"bridge": BEING_FITTED, "train_bridge": False})
    changes = {
        "loss": config.loss.model_copy(update={"representation": representation, "output": OutputConfig()}),
        "train": config.train.model_copy(
            update={"steps": math.ceil(config.bridge.prompts / config.rollout.prompts_per_step)}
        ),
        "evaluation": config.evaluation.model_copy(update={"every": 0}),
        "health": HealthConfig(),
        "teachers_in_memory": "all",
    }
    return config.model_copy(update=changes)


def check(inputs: Inputs) -> None:
    """Raise UserError for ranks that the models cannot have and for fewer prompts than are asked for."""
    config, (teacher,) = inputs.config, inputs.teachers.values()
    check_ranks(config.bridge.ranks, inputs.student.hidden_size, teacher.spec.hidden_size)
    needed = config.train.steps * config.rollout.prompts_per_step
    if inputs.prompts is not None and len(inputs.prompts.prompts) < needed:
        raise UserError(
            f"bridge.prompts={config.bridge.prompts} in steps of rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step} needs {needed} prompts, data.prompts has {len(inputs.prompts.prompts)}"
        )
    held_out = sum(is_held_out(number, config.bridge.held_out_fraction) for number in range(needed))
    if not 0 < held_out < needed:
        raise UserError(
            f"bridge.held_out_fraction={config.bridge.held_out_fraction} of {needed} prompts leaves {held_out} held "
            "out; raise bridge.prompts or change the fraction"
        )


def fit(fitting: Fitting) -> None:
    """All of stage 1, going on where a process that died left it. Collective over the world."""
    folder, readers = fitting.folder, fitting.readers
    origin = on_rank_zero(lambda: open_folder(fitting))
    stored = StoredRollouts(folder / "rollouts.jsonl", per_step(fitting.config))
    if fitting.config.rollout.engine == "megatron":
        generate(fitting, stored)
    moments = gather_moments(fitting, stored, readers)
    by_adamw = fitting.config.bridge.method == "adamw"
    mine = fit_adamw(fitting, stored, readers, moments) if by_adamw else fit_closed_form(fitting, readers, moments)
    fits = with_one_teacher_map(merged(mine))
    cosines, counts, coverage = measure(fitting, stored, readers, fits)
    origin = dataclasses.replace(origin, counts=counts, coverage=coverage)

    def write() -> None:
        write_results(folder, fits, cosines, origin)
        print_results(folder, fits, cosines)

    on_rank_zero(write)


def open_folder(fitting: Fitting) -> Origin:
    """Make the folder of the fit, or find in it what was asked for before. Raises UserError when that was something
    else. One rank calls it."""
    folder, config = fitting.folder, fitting.config
    assert fitting.inputs.bridge_origin is not None  # read_inputs(fitting=True) sets it
    origin = with_weight_hashes(fitting.inputs.bridge_origin)
    asked = {
        "student": [origin.student.hash, origin.student.tokenizer],
        "teacher": [origin.teacher.hash, origin.teacher.tokenizer],
        "data": config.data.model_dump(mode="json"),
        "rollout": config.rollout.model_dump(mode="json"),
        "content of rollout.path": _digest(config.rollout.path) if config.rollout.engine == "replay" else None,
        "loss.representation": config.loss.representation.model_dump(mode="json", include=WHICH_STATES),
        "precision": config.precision.model_dump(mode="json"),
        "bridge": config.bridge.model_dump(mode="json", include={"prompts", "held_out_fraction", "save_every"}),
        "train.seed": config.train.seed,
    }
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "asked.json").exists():
        write_json(folder / "asked.json", asked)
    before = read_json(folder / "asked.json")
    for key, value in asked.items():
        if before.get(key) != value:
            raise UserError(f"{folder} holds a fit with another {key}; go on with that one or name a new train.run_dir")
    return origin


def _digest(path: str | None) -> str:
    assert path is not None  # the configuration requires it
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


if __name__ == "__main__":
    run_command(main)
