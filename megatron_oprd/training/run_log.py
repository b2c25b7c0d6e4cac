"""The log of a run: metrics as JSON lines and as curves, lines on the terminal, evaluations, health checks, rollouts.

`health/observers.py` opens the log and writes steps and evaluations; `health/watch.py` writes checks and warnings.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.config import Config
from megatron_oprd.runtime.files import explain_os_errors, write_text
from megatron_oprd.training.curves import CurveWriter, TensorBoardCurves
from megatron_oprd.training.state import due
from megatron_oprd.training.step_line import STEPS_FOR_SPEED, StepLine, step_line
from megatron_oprd.training.wandb_curves import WandbCurves
from megatron_oprd.types import Rollout


class RunLog:
    """Appends to the files of a run folder. One rank calls the methods. Each raises UserError for a disk error."""

    def __init__(self, run_dir: Path, line: StepLine, curves: Sequence[CurveWriter], every: int = 1) -> None:
        """Prepare the log; `open` opens it.

        Args:
            run_dir: The run folder.
            line: The line that a step prints.
            curves: Programs that draw the metrics.
            every: Print a line and draw curves every so many steps. `metrics.jsonl` has every step.
        """
        self.run_dir = run_dir
        self._line, self._curve_writers, self._every = line, curves, every
        self._rows: deque[dict[str, float]] = deque(maxlen=STEPS_FOR_SPEED + 1)

    def open(self, start: int) -> None:
        """Open the files and move the lines of steps after `start`, which the run makes again, to `replaced/`."""
        run_dir = self.run_dir
        last = start if start else -1  # a new run logs an evaluation at step 0
        with explain_os_errors(run_dir):
            (run_dir / "rollouts").mkdir(parents=True, exist_ok=True)
            for folder in (".", "rollouts", "evaluations", "health"):
                for unfinished in (run_dir / folder).glob("*.tmp"):
                    unfinished.unlink()
            for name in ("metrics.jsonl", "evaluations.jsonl"):
                _keep_up_to(run_dir / name, last, run_dir / "replaced")
            for name in ("checks.jsonl", "warnings.jsonl"):
                if (run_dir / "health" / name).exists():
                    _keep_up_to(run_dir / "health" / name, last, run_dir / "replaced")
            for writer in self._curve_writers:
                writer.open(last)

    def step(self, values: dict[str, float]) -> None:
        """Append a line with `step` and every metric to `metrics.jsonl`; print and draw the metrics where due."""
        self._append("metrics.jsonl", values)
        self._rows.append(values)
        step = int(values["step"])
        if step == 1:
            print(self._line.start(values), flush=True)
        if due(step, self._every, self._line.steps, first=1):
            print(self._line.text(list(self._rows)), flush=True)
            self._curves({name: value for name, value in values.items() if name != "step"}, step)

    def evaluation(self, step: int, name: str, data: dict[str, dict[str, float]]) -> None:
        """Append a line with the metrics of every data source to `evaluations.jsonl`."""
        self._append("evaluations.jsonl", {"step": step, "name": name, "data": data})
        for source, metrics in data.items():
            print(f"{name}, {source}: {scores_in_words(metrics)}", flush=True)
        for source, metrics in data.items():
            self._curves({f"evaluation/{source}/{metric}": value for metric, value in metrics.items()}, step)

    def check(self, values: dict[str, Any], curves: dict[str, float]) -> None:
        """Append a line to `health/checks.jsonl`, and draw `curves` at its step."""
        self._append("health/checks.jsonl", values)
        self._curves(curves, int(values["step"]))

    def warning(self, values: dict[str, Any]) -> None:
        """Append a line to `health/warnings.jsonl` and print its `message`."""
        self._append("health/warnings.jsonl", values)
        print(f"warning: {values['message']}", flush=True)

    def rollouts(self, step: int, rollouts: Sequence[Rollout], tokenizer: Any, most: int = 8) -> None:
        """Write the first `most` rollouts of a step to `rollouts/`, as text or, without a tokenizer, as token ids."""
        decode = tokenizer.decode if tokenizer is not None else (lambda ids: " ".join(map(str, ids)))
        lines = [
            json.dumps(
                {
                    "step": step,
                    "prompt": decode(list(rollout.prompt_ids)),
                    "response": decode(list(rollout.response_ids)),
                    "prompt_index": rollout.prompt_index,
                    "sample_index": rollout.sample_index,
                    "finish_reason": rollout.finish_reason,
                },
                ensure_ascii=False,
            )
            for rollout in rollouts[:most]
        ]
        write_text(self.run_dir / "rollouts" / f"step_{step:07d}.jsonl", "\n".join(lines) + "\n")

    def close(self) -> None:
        """Write everything that the curves have buffered."""
        for writer in self._curve_writers:
            writer.close()

    def _curves(self, values: dict[str, float], step: int) -> None:
        for writer in self._curve_writers:
            writer.log(values, step)

    def _append(self, name: str, values: dict[str, Any]) -> None:
        with explain_os_errors(self.run_dir / name), (self.run_dir / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def scores_in_words(metrics: Mapping[str, float]) -> str:
    """Return the metrics of one data source in an evaluation as text, without those of single layers."""
    shown = [f"{key} {value:.4g}" for key, value in metrics.items() if "/layer_" not in key]
    graded = any(key.startswith("avg@") for key in metrics)
    return ", ".join(shown if graded else ["not graded", *shown])


def make_run_log(config: Config) -> RunLog:
    """Return the log of a run, with the curves that `logging` names. It is not open yet."""
    run_dir, settings = Path(config.train.run_dir), config.logging
    curves: list[CurveWriter] = [TensorBoardCurves(run_dir)] if settings.tensorboard else []
    if settings.wandb is not None:
        curves.append(WandbCurves(run_dir, settings.wandb, config.model_dump(mode="json")))
    return RunLog(run_dir, step_line(config), curves, settings.every)


def _keep_up_to(path: Path, step: int, aside: Path) -> None:
    """Move the lines of steps after `step` to the end of a file in the folder `aside`; drop incomplete lines."""
    if not path.exists():
        path.touch()
        return
    kept, moved = [], {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line_step = json.loads(line)["step"]
            if line_step <= step:
                kept.append(line)
            else:
                moved[line] = line_step
        except (ValueError, TypeError, KeyError):
            continue
    if moved:
        aside.mkdir(exist_ok=True)
        with (aside / path.name).open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in moved)
        first, last = min(moved.values()), max(moved.values())
        print(f"{path}: the lines of steps {first} to {last} are now in {aside / path.name}", flush=True)
    write_text(path, "".join(f"{line}\n" for line in kept))
