"""The health watch of a run: it measures the start model's own answers at regular steps and warns of a collapse.

The objective alone does not reveal a collapse. Perplexity, entropy and KL of the stored answers (`measure.py`),
response lengths and accuracies do; `rule.py` decides when to warn. `observers.py` calls the watch.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from megatron_oprd.config import Config
from megatron_oprd.evaluation.measure import MeasuredModels, measure_answers
from megatron_oprd.health.answers import (
    AnswerCounts,
    choose_prompts,
    generate_answers,
    keep_answers,
    load_answers,
)
from megatron_oprd.health.rule import Check, HealthHistory, HealthWarning, new_warnings
from megatron_oprd.launch.assemble import Run
from megatron_oprd.launch.measured import measured_models
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.training.run_log import RunLog
from megatron_oprd.training.state import due
from megatron_oprd.types import Rollout


@dataclasses.dataclass
class HealthWatch:
    """Measures the answers, keeps the history of a run and logs warnings. Its methods are collective over the world."""

    config: Config
    models: MeasuredModels
    log: RunLog
    answers: tuple[Rollout, ...]  # the start model's answers
    history: HealthHistory = dataclasses.field(default_factory=HealthHistory)

    def check_start(self, counts: AnswerCounts) -> None:
        """Measure the start model at step 0 and log the result with the numbers of its answers."""
        check = self._measure(0)
        self.history = self.history.with_check(check, with_lengths=self._lengths_count)

        def write() -> None:
            self.log.check(dataclasses.asdict(check) | dataclasses.asdict(counts), check.metrics())
            right = "" if counts.right is None else f", {counts.right} of {counts.graded} right"
            read = f"; the {len(self.answers)} right ones are read" if counts.filtered else ""
            print(
                f"health: {counts.answers} answers of the start model{right}{read}: {_summary(check)}",
                flush=True,
            )

        on_rank_zero(write)

    def after_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Add a training step to the history; measure every `health.every` steps and at the last step.

        Returns: the measured metrics, or no metrics after other steps.
        """
        self.history = self.history.with_step(metrics)
        if not due(step, self.config.health.every, self.config.train.steps):
            return {}
        started = time.perf_counter()
        self.history = self.history.with_check(self._measure(step), with_lengths=self._lengths_count)
        check = self.history.checks[-1]
        on_rank_zero(lambda: self.log.check(dataclasses.asdict(check), {}))  # the step's metrics draw the curves
        self._warn(step)
        warnings = {"health/warnings": float(len(self.history.warnings))}
        return check.metrics() | warnings | {"time/health": time.perf_counter() - started}

    def after_evaluation(self, step: int, scores: Mapping[str, Mapping[str, float]]) -> None:
        """Add the scores of an evaluation, by data source, to the history."""
        self.history = self.history.with_evaluation(scores)
        self._warn(step)

    def reason_to_stop(self) -> str | None:
        """Return the message that ends the run before its last step, or None."""
        if not (self.config.health.stop and self.history.warnings):
            return None
        return f"stopped by health.stop=true: {self.history.warnings[0].message}"

    @property
    def _lengths_count(self) -> bool:
        """Return True if response lengths reveal something about the student.

        Stored responses do not, and with a growing horizon the lengths grow by design.
        """
        return self.config.rollout.generates and self.config.rollout.horizon in (None, "auto")

    def _measure(self, step: int) -> Check:
        measured = measure_answers(self.models, self.answers)
        return Check(step, measured.perplexity, measured.entropy, measured.reverse_kl)

    def _warn(self, step: int) -> None:
        """Log the new warnings. Rank 0 judges for all ranks, so that all of them stop after the same step."""

        def judge_and_log() -> list[HealthWarning]:
            new = new_warnings(self.history, step, self.config)
            for warning in new:
                self.log.warning(dataclasses.asdict(warning))
            return new

        self.history = self.history.with_warnings(on_rank_zero(judge_and_log))


def begin_watch(run: Run, log: RunLog) -> HealthWatch | None:
    """Return the watch of a run at step 0, after the start model has answered; None if `health.every` is 0.

    Collective over the world. Raises UserError if no prompt leaves room for an answer.
    """
    inputs = run.inputs
    if not inputs.config.health.every:
        return None
    prompts, limits = choose_prompts(inputs)
    answers = generate_answers(inputs, run.student.stage, run.topology, prompts, limits)
    kept, counts = on_rank_zero(partial(keep_answers, inputs.run_dir, inputs.tokenizer, prompts, answers))
    watch = HealthWatch(inputs.config, measured_models(run, layers=False), log, tuple(kept))
    watch.check_start(counts)
    return watch


def resume_watch(run: Run, log: RunLog) -> HealthWatch | None:
    """Return the watch of a resumed run, from the files of its folder; None if `health.every` is 0.

    Collective over the world. `launch/run_folder.py` has checked that the files exist.
    """
    inputs = run.inputs
    if not inputs.config.health.every:
        return None
    answers, history = on_rank_zero(
        lambda: (load_answers(inputs.run_dir, inputs.setup.student.vocab_size), read_history(inputs.run_dir))
    )
    return HealthWatch(inputs.config, measured_models(run, layers=False), log, answers, history)


def read_history(run_dir: Path) -> HealthHistory:
    """Return the history of a run up to the ends of its files. No communication."""
    checks, warnings, steps, evaluations = (
        _read_lines(run_dir / name)
        for name in ("health/checks.jsonl", "health/warnings.jsonl", "metrics.jsonl", "evaluations.jsonl")
    )
    names = [field.name for field in dataclasses.fields(Check)]
    history = HealthHistory(
        checks=tuple(Check(**{name: line[name] for name in names}) for line in checks),
        warnings=tuple(HealthWarning(**line) for line in warnings),
    )
    for line in steps:
        if line["step"] > checks[-1]["step"]:
            history = history.with_step(line)
    for line in evaluations:
        if line["name"] != "teacher":
            history = history.with_evaluation(line["data"])
    return history


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a JSONL file; a run without a warning has no file of warnings."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _summary(check: Check) -> str:
    kl = "" if check.reverse_kl is None else f", KL(student || teacher) {check.reverse_kl:.4g}"
    return f"perplexity {check.perplexity:.4g}, entropy {check.entropy:.4g}{kl}"
