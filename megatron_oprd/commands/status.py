"""Print where a run stands, from the files of its folder. The run may be going on, on this machine or on another."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_oprd.config.yaml_core import load_yaml
from megatron_oprd.evaluation.records import Record, by_step, get, is_number, read_best, read_jsonl, read_text
from megatron_oprd.runtime.cli import ArgumentParser, run_command
from megatron_oprd.runtime.readable import count, duration, significant
from megatron_oprd.training.step_line import seconds_left, tokens_per_second
from megatron_oprd.types import UserError

PARSER = ArgumentParser(prog="megatron-oprd status", description="Print where a run stands.")
PARSER.add_argument("run", metavar="RUN", help="the run folder (train.run_dir)")
SHOWN = {"loss": "loss", "rep/cosine": "cosine", "output/reverse_kl": "KL", "grad_norm": "gradient norm", "lr": "lr"}
HEARTBEATS_MISSED = 6  # a rank that was silent for so many heartbeats no longer runs


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Raises UserError if the folder does not exist."""
    run_dir = Path(PARSER.parse_args(arguments).run)
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; name the train.run_dir of a run")
    print("\n".join(status_lines(run_dir)))
    return 0


def is_running(run_dir: Path) -> bool:
    """Return True if a process works on the run now, by the age of the ranks' heartbeats."""
    facts = dict(_facts(run_dir, time.time()))
    return facts["state"].startswith("running")


def status_lines(run_dir: Path) -> list[str]:
    """Return one line for each part of a run's state: what it does, steps, speed, metrics, checkpoint, evaluation."""
    return [f"{heading:<10} {text}" for heading, text in _facts(run_dir, time.time())]


def _facts(run_dir: Path, now: float) -> Iterator[tuple[str, str]]:
    config, metrics = _config(run_dir), by_step(read_jsonl(run_dir / "metrics.jsonl"))
    planned = get(config, "train", "steps")
    step = metrics[-1]["step"] if metrics else 0
    beats = [beat for file in sorted((run_dir / "heartbeats").glob("rank_*.json")) for beat in _json(file)]
    stopped_early = bool(metrics) and read_best(run_dir).get("stopped_at") == step
    is_complete = stopped_early or (isinstance(planned, int) and step >= planned)
    state = _state(run_dir, beats, config, now, is_complete=is_complete)
    yield "state", f"{state}: stopped early by evaluation.patience" if stopped_early and state == "finished" else state
    yield "step", f"{step} of {planned}" if planned else f"{step}"
    if metrics:
        speed = _speed(metrics, config, step if stopped_early else planned)
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
    best = read_best(run_dir)
    if is_number(best.get("value")):
        value = f"{best.get('metric')} {significant(best['value'])} at step {best.get('step')}"
        yield "best", f"{value}, {best.get('checkpoint')}; {best.get('later')} evaluations since"
    if beats:
        oldest = min(beats, key=lambda beat: beat["time"])
        age = duration(now - oldest["time"])
        yield (
            "processes",
            f"{len(beats)}; oldest heartbeat: rank {oldest.get('rank')} on {oldest.get('host')}, {age} ago",
        )
    if (run_dir / "hf").is_dir():
        yield "exported", str(run_dir / "hf")


def _state(run_dir: Path, beats: Sequence[Record], config: Any, now: float, *, is_complete: bool) -> str:
    """Return what the run does, or how it ended.

    A rank that ends by itself removes its heartbeat. A failure counts if it is later than the start of the newest
    process, which writes environment.json.
    """
    patience = HEARTBEATS_MISSED * (get(config, "watchdog", "heartbeat_seconds") or 10.0)
    if beats:
        oldest = min(beats, key=lambda beat: beat["time"])
        place = f"{oldest.get('stage')} of step {oldest['step']}" if oldest.get("step") else oldest.get("stage")
        if now - oldest["time"] <= patience:
            return f"running: {place}"
        return f"lost: rank {oldest.get('rank')} was killed or its machine is gone, last seen in {place}"
    environment = run_dir / "environment.json"
    started = environment.stat().st_mtime if environment.exists() else 0.0
    failures = [record for file in (run_dir / "failures").glob("*.json") for record in _json(file)]
    recent = sorted(
        (one for one in failures if one["time"] >= started), key=lambda one: (not one.get("line"), one["time"])
    )
    if recent:
        return f"failed: {recent[0].get('line') or recent[0].get('error')}"
    if is_complete:
        return "finished"
    warnings = read_jsonl(run_dir / "health" / "warnings.jsonl")
    if warnings and get(config, "health", "stop"):
        return f"stopped by health.stop=true: {warnings[0].get('message')}"
    return "stopped"


def _speed(metrics: Sequence[Record], config: Any, last_step: Any) -> str:
    """Return the tokens per second of the last steps and the time until `last_step`, or '' if neither is known."""
    prompts, samples = (get(config, "rollout", name) for name in ("prompts_per_step", "samples_per_prompt"))
    if not (isinstance(prompts, int) and isinstance(samples, int)):
        return ""
    speed = tokens_per_second(metrics, prompts * samples)
    left = seconds_left(metrics, last_step or 0)
    parts = [f"{count(speed)} response tokens/s"] if speed is not None else []
    return ", ".join([*parts, f"{duration(left)} left"] if left is not None and left > 0 else parts)


def _evaluation(record: Record) -> str:
    data = record.get("data") or {}
    source = "all" if "all" in data else next(iter(data), "")
    shown = {name: value for name, value in data.get(source, {}).items() if "/layer_" not in name}
    scores = ", ".join(f"{name} {significant(value)}" for name, value in shown.items())
    return f"step {record.get('step')}, {source}: {scores}"


def _config(run_dir: Path) -> Any:
    try:
        return load_yaml(read_text(run_dir / "config.yaml"))
    except yaml.YAMLError:
        return None


def _json(path: Path) -> list[Record]:
    """Return the record of a heartbeat or failure in a list, or an empty list if it cannot be read or has no time."""
    try:
        record = json.loads(read_text(path))
    except ValueError:
        return []
    return [record] if isinstance(record, dict) and isinstance(record.get("time"), int | float) else []


if __name__ == "__main__":
    run_command(main)
