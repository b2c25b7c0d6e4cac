"""The run that a run folder already has: what it has done, and which keys the new configuration changes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatron_oprd.checkpoint.training_state import latest_checkpoint
from megatron_oprd.config import Config, ScheduleConfig, leaves
from megatron_oprd.config.yaml_core import load_yaml
from megatron_oprd.evaluation.records import by_step, read_jsonl
from megatron_oprd.launch.inputs import TOKENS, Inputs
from megatron_oprd.types import UserError

Changes = dict[str, tuple[Any, Any]]  # by dotted key: the earlier value and the new one


def check_run_folder(inputs: Inputs) -> None:
    """Raise UserError if the run must not begin or continue in its run folder. No communication; changes nothing."""
    config, run_dir = inputs.config, inputs.run_dir
    found, logged = latest_checkpoint(run_dir / "checkpoints"), last_logged_step(run_dir)
    if config.checkpoint.resume == "never" and (found or (run_dir / "metrics.jsonl").exists()):
        raise UserError(f"{run_dir} holds a run; name a new train.run_dir or set checkpoint.resume=auto")
    done, steps = step_of(found), config.train.steps
    if done > steps:
        raise UserError(
            f"{run_dir} holds a run of {done} steps, and train.steps={steps} asks for fewer; set train.steps to {done} "
            "or more, name a new train.run_dir, or export an earlier checkpoint with "
            "`megatron-oprd export --megatron RUN/checkpoints/STEP/model --hf DIR`"
        )
    if found is not None:
        check_schedule(run_dir / "config.yaml", config, done)
    if found is None and logged:
        changes = find_changes(run_dir / "config.yaml", config)
        if inputs.automatic:  # their values are chosen later
            changes = {key: both for key, both in changes.items() if key != TOKENS and not key.startswith("recompute")}
        if changes:
            raise UserError(
                f"{run_dir} holds the metrics of {logged} steps of another run and no checkpoint to continue from "
                f"({'; '.join(in_words(changes))}); name a new train.run_dir"
            )
        if logged >= steps and (run_dir / "hf").exists():
            raise UserError(
                f"{run_dir} holds a complete run of {logged} steps and no checkpoint to continue from; name a new "
                "train.run_dir"
            )


def check_schedule(path: Path, config: Config, done: int) -> None:
    """Raise UserError if the loss of one of the `done` updates of an earlier run had other multipliers.

    `path` is the run's `config.yaml`. A file that cannot be read has no schedule.
    """
    loss = _read(path).get("loss")
    earlier = loss.get("schedule") if isinstance(loss, dict) else None
    before = ScheduleConfig()
    with contextlib.suppress(ValidationError):  # a file that was edited
        before = before if earlier is None else ScheduleConfig.model_validate(earlier)
    now = config.loss.schedule or ScheduleConfig()
    for step in range(done):
        if before.multipliers(step) != now.multipliers(step):
            then, of_config = (json.dumps(one.multipliers(step)) for one in (before, now))
            raise UserError(
                f"{path.parent} holds a run of {done} steps, which was trained with the multipliers {then} after "
                f"{step} updates; loss.schedule has {of_config}; use a schedule that agrees up to step {done}, or name "
                "a new train.run_dir"
            )


def step_of(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint from its name; 0 without a checkpoint."""
    return int(checkpoint.name.removeprefix("step_")) if checkpoint is not None else 0


def last_logged_step(run_dir: Path) -> int:
    """Return the step of the last complete line of metrics.jsonl, or 0."""
    rows = by_step(read_jsonl(run_dir / "metrics.jsonl"))
    return int(rows[-1]["step"]) if rows else 0


def find_changes(path: Path, config: Config) -> Changes:
    """Return the keys whose values differ between the YAML file of an earlier run and the configuration.

    The run folder may have moved, so `train.run_dir` does not count. Neither do keys that the file lacks, because an
    older version wrote it. An unreadable file has no changes.
    """
    before = dict(leaves(_read(path)))
    now = dict(leaves(config.model_dump(mode="json")))
    keys = [key for key in now if key in before and key != "train.run_dir"]
    return {key: (before[key], now[key]) for key in keys if before[key] != now[key]}


def in_words(changes: Changes) -> list[str]:
    """Return one text for each changed key, like `optimizer.lr 0.003 -> 0.0001`."""
    return [f"{key} {json.dumps(before)} -> {json.dumps(now)}" for key, (before, now) in changes.items()]


def _read(path: Path) -> dict[str, Any]:
    """Return the values of a YAML file of an earlier run; none if the file cannot be read."""
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}
