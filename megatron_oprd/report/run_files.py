"""Read everything that the page of a run shows. A missing file, a broken line or a bad value leaves a gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_oprd.config.yaml_core import load_yaml
from megatron_oprd.evaluation.records import Record, by_step, curve, get, read_best, read_jsonl, read_text
from megatron_oprd.types import UserError

_FILES_OF_A_RUN = ("config.yaml", "metrics.jsonl", "environment.json", "heartbeats", "failures")


@dataclass(frozen=True)
class RunFiles:
    """The content of a run folder."""

    run_dir: Path
    metrics: Sequence[Record]  # sorted by step, one for each
    evaluations: Sequence[Record]  # of the student
    teacher_evaluation: Record | None
    config_text: str
    config: Any  # a mapping, or None if config.yaml cannot be read
    best: Record
    warnings: Sequence[str]  # of the health checks

    @property
    def name(self) -> str:
        return self.run_dir.resolve().name

    @property
    def last_step(self) -> int:
        """Return the last step that is complete; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def seconds(self) -> float:
        """Return the seconds of all training steps, without evaluations and checkpoints."""
        return sum(value for _, value in curve(self.metrics, "time/step") if value > 0)

    def model(self, role: str) -> str:
        """Return the path of the `student` or the `teacher`; of several teachers, all paths. Empty if unknown."""
        path = get(self.config, role, "path")
        if path is None and role == "teacher" and isinstance(teachers := get(self.config, "teachers"), dict):
            return ", ".join(str(get(teacher, "path")) for teacher in teachers.values())
        return "" if path is None else str(path)

    @property
    def rollouts_per_step(self) -> int | None:
        prompts, samples = (get(self.config, "rollout", key) for key in ("prompts_per_step", "samples_per_prompt"))
        return prompts * samples if isinstance(prompts, int) and isinstance(samples, int) else None


def check_is_run(run_dir: Path) -> None:
    """Raise UserError for a folder in which no run has written, such as the parent of several run folders."""
    if run_dir.is_dir() and any(run_dir.iterdir()) and not any((run_dir / name).exists() for name in _FILES_OF_A_RUN):
        inside = sorted(path.parent.name for path in run_dir.glob("*/metrics.jsonl"))
        runs = f" (such as {run_dir / inside[0]})" if inside else ""
        raise UserError(f"{run_dir} is not a run folder, as it has no metrics.jsonl; name a train.run_dir{runs}")


def read_run(run_dir: Path) -> RunFiles:
    """Return the content of a run folder. Raises UserError if the folder does not exist."""
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; name the train.run_dir of a run")
    evaluations = [item for item in read_jsonl(run_dir / "evaluations.jsonl") if isinstance(item.get("data"), dict)]
    teachers = [item for item in evaluations if item.get("name") == "teacher"]
    config_text = read_text(run_dir / "config.yaml")
    try:
        config = load_yaml(config_text)
    except yaml.YAMLError:
        config = None
    warnings = [str(item.get("message")) for item in read_jsonl(run_dir / "health" / "warnings.jsonl")]
    return RunFiles(
        run_dir,
        by_step(read_jsonl(run_dir / "metrics.jsonl")),
        [item for item in evaluations if item not in teachers],
        teachers[-1] if teachers else None,
        config_text,
        config,
        read_best(run_dir),
        warnings,
    )
