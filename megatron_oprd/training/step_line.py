"""The line that a training step prints: progress, the metrics that matter most, speed and the time that is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oprd.config import Config
from megatron_oprd.runtime.readable import count, duration, significant

# Metric, name on the line, decimals (None: significant digits), width of the value.
_COLUMNS = (
    ("loss", "loss", None, 8),
    ("rep/cosine", "cosine", 4, 7),
    ("output/reverse_kl", "KL", None, 8),
)
STEPS_FOR_SPEED = 20  # the speed is a mean over the last steps, because responses differ in length


@dataclass(frozen=True)
class StepLine:
    """The columns of the lines of one run, which all lines have, so that their values stand below each other."""

    steps: int  # of the run
    metrics: tuple[str, ...]  # the metrics of _COLUMNS that this run measures
    rollouts: int  # responses of a step

    def text(self, rows: Sequence[Mapping[str, float]]) -> str:
        """Return the line of the last of `rows`, the metrics of the latest steps; a step without a metric has a dash.

        The line has at most 100 characters in a run of fewer than 10,000 steps.
        """
        row = rows[-1]
        width = len(str(self.steps))
        parts = [f"{row['step']:>{width}.0f}/{self.steps}"]
        parts += [_column(row, *column) for column in _COLUMNS if column[0] in self.metrics]
        parts.append(f"lr {row['lr']:.2e}")
        speed, left = tokens_per_second(rows, self.rollouts), seconds_left(rows, self.steps)
        parts.append(f"{count(speed) if speed is not None else '-':>6} tok/s")
        parts.append(f"{duration(left)} left" if left else "")
        return "  ".join(parts).rstrip()

    def start(self, row: Mapping[str, float]) -> str:
        """Return the line about the student before the first update, from the metrics of step 1.

        A step measures its metrics on the weights that it then updates.
        """
        values = [_column(row, *column) for column in _COLUMNS if column[0] in row]
        return f"start: {', '.join(' '.join(value.split()) for value in values)} (the student before its first update)"


def step_line(config: Config) -> StepLine:
    """Return the columns for a run of this configuration."""
    loss, rollout = config.loss, config.rollout
    metrics = ["loss"]
    metrics += ["rep/cosine"] if loss.reads_layers else []
    metrics += ["output/reverse_kl"] if loss.reads_output and loss.output.metrics_every else []
    return StepLine(config.train.steps, tuple(metrics), rollout.prompts_per_step * rollout.samples_per_prompt)


def tokens_per_second(rows: Sequence[Mapping[str, float]], rollouts: int) -> float | None:
    """Return the response tokens per second of the last steps, or None if it is not known.

    Args:
        rows: the metrics of consecutive steps.
        rollouts: responses of a step.
    """
    rows = [row for row in _without_the_first_step(rows) if {"time/step", "rollout/length_mean"} <= row.keys()]
    seconds = sum(row["time/step"] for row in rows)
    return sum(row["rollout/length_mean"] for row in rows) * rollouts / seconds if seconds > 0 else None


def seconds_left(rows: Sequence[Mapping[str, float]], steps: int) -> float | None:
    """Return the seconds until step `steps` at the speed of the last steps, or None if it is not known.

    The time of evaluations and checkpoints is left out.
    """
    times = [row["time/step"] for row in _without_the_first_step(rows) if "time/step" in row]
    return (steps - rows[-1]["step"]) * sum(times) / len(times) if times else None


def _without_the_first_step(rows: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Return the last steps without the first one of the process, which also compiles and allocates."""
    return rows[-STEPS_FOR_SPEED:] if len(rows) > STEPS_FOR_SPEED else rows[1:] or rows


def _column(row: Mapping[str, float], metric: str, name: str, decimals: int | None, width: int) -> str:
    value = row.get(metric)
    if value is None:
        text = "-"
    else:
        text = significant(value) if decimals is None or not math.isfinite(value) else f"{value:.{decimals}f}"
    return f"{name} {text:>{width}}"
