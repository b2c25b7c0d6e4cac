"""Prepare a fit: its configuration, the checks before any model is built, and the folder with its results."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track

from megatron_oprd.bridge.fitting.paired_states import ModelPair
from megatron_oprd.bridge.fitting.solve import check_ranks
from megatron_oprd.bridge.origin import with_weight_hashes
from megatron_oprd.bridge.record import Origin
from megatron_oprd.config import Config, HealthConfig, OutputConfig, RolloutConfig
from megatron_oprd.launch.assemble import Models
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import explain_os_errors, read_json, write_json
from megatron_oprd.types import UserError

BRIDGE_TO_FIT = "(being fitted)"  # value of loss.representation.bridge during a fit: a config with a bridge is checked
SELECTION_KEYS = {"layers", "pairs", "positions", "k", "shift", "final_norm"}  # of loss.representation


@dataclass(frozen=True)
class FitRun:
    """The inputs and the models of one fit."""

    inputs: Inputs
    models: Models

    @property
    def config(self) -> Config:
        return self.inputs.config

    @property
    def folder(self) -> Path:
        """The folder with all files of the fit."""
        return self.inputs.run_dir / "bridge"

    @property
    def rollouts_per_step(self) -> int:
        """Rollouts of one step, over all ranks."""
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    @property
    def pair(self) -> ModelPair:
        """The student and the teacher on this rank."""
        (planned,), (teacher,) = self.inputs.setup.teachers.values(), self.models.teachers
        return ModelPair(
            self.inputs.setup.student,
            planned.spec,
            planned.plan,
            self.models.topology,
            self.models.stage,
            teacher,
        )

    def steps(self, phase: str, start: int = 0) -> Iterator[int]:
        """Yield the numbers of the steps from `start`, with a progress bar on rank 0."""
        total, silent = self.config.train.steps, self.models.topology.rank != 0
        for step in track(range(start, total), phase, total=total, completed=start, disable=silent):
            progress.enter(phase, step + 1)
            yield step
        progress.enter(f"after {phase}")


def is_held_out(prompt: int, fraction: float) -> bool:
    """Return True if the prompt with this number is held out: every (1 / fraction)-th prompt, evenly spaced.

    Prompts are numbered from 0 in the order in which they are used. All answers to a prompt are on the same side.
    """
    return math.floor((prompt + 1) * fraction) > math.floor(prompt * fraction)


def fitting_config(config: Config) -> Config:
    """Return the configuration of a fit from that of a training run.

    It has as many steps as `bridge.prompts` needs, and no output-space loss, schedule, base of the teacher, growing
    horizon, evaluation or health checks.

    Raises:
        UserError: there are several teachers, or the loss compares no hidden states.
    """
    if config.teachers:
        raise UserError("a bridge joins the student with one teacher; name it as teacher.path")
    if not config.loss.reads_layers:
        raise UserError(
            "loss.representation.weight=0 compares no hidden states, and a bridge maps hidden states; set it above 0"
        )
    representation = config.loss.representation.model_copy(update={"bridge": BRIDGE_TO_FIT, "train_bridge": False})
    loss = {"representation": representation, "output": OutputConfig(), "schedule": None}
    horizon = config.rollout.horizon if config.rollout.horizon == "auto" else None  # a fit has no training steps
    changes = {
        "rollout": config.rollout.model_copy(update={"horizon": horizon}),
        "loss": config.loss.model_copy(update=loss),
        "teacher": config.teacher.model_copy(update={"base": None}) if config.teacher is not None else None,
        "train": config.train.model_copy(
            update={"steps": math.ceil(config.bridge.prompts / config.rollout.prompts_per_step)}
        ),
        "evaluation": config.evaluation.model_copy(update={"every": 0}),
        "health": HealthConfig(),
        "teachers_in_memory": "all",
    }
    return config.model_copy(update=changes)


def check_inputs(inputs: Inputs) -> None:
    """Raise UserError for ranks above a hidden size, too few prompts, and a fraction that holds out none or all."""
    config, (teacher,) = inputs.config, inputs.setup.teachers.values()
    check_ranks(config.bridge.ranks, inputs.setup.student.hidden_size, teacher.spec.hidden_size)
    needed = config.train.steps * config.rollout.prompts_per_step
    if inputs.prompts is not None and len(inputs.prompts.prompts) < needed:
        raise UserError(
            f"bridge.prompts={config.bridge.prompts} in steps of rollout.prompts_per_step="
            f"{config.rollout.prompts_per_step} needs {needed} prompts, data.prompts has "
            f"{len(inputs.prompts.prompts)}; lower bridge.prompts or name more files in data.prompts"
        )
    held_out = sum(is_held_out(number, config.bridge.held_out_fraction) for number in range(needed))
    if not 0 < held_out < needed:
        raise UserError(
            f"bridge.held_out_fraction={config.bridge.held_out_fraction} of {needed} prompts leaves {held_out} held "
            "out; raise bridge.prompts or change the fraction"
        )


def open_folder(run: FitRun) -> Origin:
    """Create the folder of the fit and return the bridge's origin. Call it on one rank.

    The settings that decide which states are compared are stored in asked.json, so that a fit continues only with
    the same settings.

    Raises:
        UserError: the folder contains a fit with other settings, or cannot be written.
    """
    folder, config = run.folder, run.config
    assert run.inputs.bridge_origin is not None  # read_inputs(fitting=True) sets it
    origin = with_weight_hashes(run.inputs.bridge_origin, run.models.hashes)
    settings = {
        "student": [origin.student.hash, origin.student.tokenizer],
        "teacher": [origin.teacher.hash, origin.teacher.tokenizer],
        "data": config.data.model_dump(mode="json"),
        "rollout": _rollout_settings(config.rollout),
        "content of rollout.path": _file_hash(config.rollout.path) if config.rollout.engine == "replay" else None,
        "loss.representation": config.loss.representation.model_dump(mode="json", include=SELECTION_KEYS),
        "precision": config.precision.model_dump(mode="json"),
        "bridge": config.bridge.model_dump(mode="json", include={"prompts", "held_out_fraction", "save_every"}),
        "train.seed": config.train.seed,
    }
    with explain_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "asked.json").exists():
        write_json(folder / "asked.json", settings)
    stored = read_json(folder / "asked.json")
    # An older version did not store keys that were added since. Their defaults keep its behaviour.
    stored["rollout"] = _rollout_settings(RolloutConfig()) | stored.get("rollout", {})
    for key, value in settings.items():
        if stored.get(key) != value:
            raise UserError(
                f"{folder} holds a fit with another {key}; continue with that one or name a new train.run_dir"
            )
    return origin


def _rollout_settings(config: RolloutConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude={"ahead", "tokens_per_second"})  # a fit trains no student


def _file_hash(path: str | None) -> str:
    assert path is not None  # the configuration requires it
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
