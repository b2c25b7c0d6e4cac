"""Print where a run stands, from the files of its folder. The run may be going on, on this machine or on another."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_oprd.evaluation.records import Record, get, is_number, overall_source, read_jsonl
from megatron_oprd.report.run_files import RunFiles, check_is_run, read_run
from megatron_oprd.report.run_state import heartbeats, is_running, run_state, stopped_early
from megatron_oprd.runtime.cli import ArgumentParser, run_command
from megatron_oprd.runtime.readable import count, duration, significant
from megatron_oprd.training.step_line import seconds_left, tokens_per_second

PARSER = ArgumentParser(prog="megatron-oprd status", description="Print where a run stands.")
PARSER.add_argument("run", metavar="RUN", help="the run folder (train.run_dir)")
SHOWN = {"loss": "loss", "rep/cosine": "cosine", "output/reverse_kl": "KL", "grad_norm": "gradient norm", "lr": "lr"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Raises UserError if there is no such run folder."""
    run_dir = Path(PARSER.parse_args(arguments).run)
    check_is_run(run_dir)
    print("\n".join(status_lines(run_dir)))
    return 0


def status_lines(run_dir: Path) -> list[str]:
    """Return one line for each part of a run's state: what it does, steps, speed, metrics, checkpoint, evaluation.

    Raises UserError if the folder does not exist.
    """
    return [f"{heading:<10} {text}" for heading, text in _facts(read_run(run_dir), time.time())]


def _facts(run: RunFiles, now: float) -> Iterator[tuple[str, str]]:
    run_dir, metrics, step = run.run_dir, run.metrics, run.last_step
    planned = get(run.config, "train", "steps")
    yield "state", run_state(run, now, runs=is_running(run, now))
    yield "step", f"{step} of {planned}" if planned else f"{step}"
    if metrics:
        speed = _speed(run, step if stopped_early(run) else planned)
        if speed:
            yield "speed", speed
        values = (
            f"{name} {significant(metrics[-1][key])}"
            for key, name in SHOWN.items()
            if isinstance(metrics[-1].get(key), int | float)
        )
        yield "metrics", ", ".join(values)
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*") if (path / "complete").exists())
    yield "checkpoint", checkpoints[-1] if checkpoints else "none"
    evaluations = read_jsonl(run_dir / "evaluations.jsonl")
    if evaluations:
        yield "evaluation", _evaluation(evaluations[-1])
    if is_number(run.best.get("value")):
        value = f"{run.best.get('metric')} {significant(run.best['value'])} at step {run.best.get('step')}"
        yield "best", f"{value}, {run.best.get('checkpoint')}; {run.best.get('later')} evaluations since"
    beats = heartbeats(run_dir)
    if beats:
        oldest = min(beats, key=lambda beat: beat["time"])
        age = duration(now - oldest["time"])
        yield (
            "processes",
            f"{len(beats)}; oldest heartbeat: rank {oldest.get('rank')} on {oldest.get('host')}, {age} ago",
        )
    if (run_dir / "hf").is_dir():
        yield "exported", str(run_dir / "hf")


def _speed(run: RunFiles, last_step: Any) -> str:
    """Return the tokens per second of the last steps and the time until `last_step`, or '' if neither is known."""
    if run.rollouts_per_step is None:
        return ""
    speed = tokens_per_second(run.metrics, run.rollouts_per_step)
    left = seconds_left(run.metrics, last_step or 0)
    parts = [f"{count(speed)} response tokens/s"] if speed is not None else []
    return ", ".join([*parts, f"{duration(left)} left"] if left is not None and left > 0 else parts)


def _evaluation(record: Record) -> str:
    data = record.get("data") or {}
    source = overall_source(data)
    shown = {name: value for name, value in data.get(source, {}).items() if "/layer_" not in name}
    scores = ", ".join(f"{name} {significant(value)}" for name, value in shown.items())
    return f"step {record.get('step')}, {source}: {scores}"


if __name__ == "__main__":
    run_command(main)
