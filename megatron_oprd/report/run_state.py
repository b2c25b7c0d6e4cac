"""Tell what a run does or how it ended, from the files of its folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_oprd.evaluation.records import Record, get, is_number, read_json
from megatron_oprd.report.run_files import RunFiles

HEARTBEATS_MISSED = 6  # a rank that was silent for so many heartbeats no longer runs


def heartbeats(run_dir: Path) -> list[Record]:
    """Return the newest heartbeat of each rank. A rank that ends by itself removes its heartbeat."""
    return _timed(sorted((run_dir / "heartbeats").glob("rank_*.json")))


def is_running(run: RunFiles, now: float) -> bool:
    """Return True if a process works on the run now, by the age of the ranks' heartbeats.

    `now`: seconds since the epoch.
    """
    beats = heartbeats(run.run_dir)
    return bool(beats) and now - _oldest(beats)["time"] <= _patience(run)


def stopped_early(run: RunFiles) -> bool:
    """Return True if evaluation.patience ended the run."""
    return bool(run.metrics) and run.best.get("stopped_at") == run.metrics[-1]["step"]


def run_state(run: RunFiles, now: float, *, runs: bool) -> str:
    """Return what the run does, or how it ended: a word, and after a colon what else is known.

    A failure counts if it is later than the start of the newest process, which writes environment.json.

    Args:
        run: The content of the run folder.
        now: Seconds since the epoch.
        runs: True if a process works on the run. A process that writes the last report of its own run says False.
    """
    beats = heartbeats(run.run_dir)
    if beats and runs:
        return f"running: {_place(_oldest(beats))}"
    if beats and not is_running(run, now):
        oldest = _oldest(beats)
        lost = f"rank {oldest.get('rank')} was killed or its machine is gone"
        return f"lost: {lost}, last seen in {_place(oldest)}"
    if runs:
        return "running"
    environment = run.run_dir / "environment.json"
    started = environment.stat().st_mtime if environment.exists() else 0.0
    failures = [one for one in _timed((run.run_dir / "failures").glob("*.json")) if one["time"] >= started]
    if failures:
        first = min(failures, key=lambda one: (not one.get("line"), one["time"]))
        return f"failed: {first.get('line') or first.get('error')}"
    if stopped_early(run):
        return "finished: stopped early by evaluation.patience"
    planned = get(run.config, "train", "steps")
    if isinstance(planned, int) and run.last_step >= planned:
        return "finished"
    if run.warnings and get(run.config, "health", "stop"):
        return f"stopped by health.stop=true: {run.warnings[0]}"
    return "stopped"


def _oldest(beats: Sequence[Record]) -> Record:
    return min(beats, key=lambda beat: beat["time"])


def _place(beat: Record) -> str:
    return f"{beat.get('stage')} of step {beat['step']}" if beat.get("step") else str(beat.get("stage"))


def _patience(run: RunFiles) -> float:
    seconds = get(run.config, "watchdog", "heartbeat_seconds")
    return HEARTBEATS_MISSED * (seconds if is_number(seconds) and seconds else 10.0)


def _timed(paths: Iterable[Path]) -> list[Record]:
    """Return the records of heartbeats or failures; a file that cannot be read or has no time is left out."""
    return [record for record in map(read_json, paths) if is_number(record.get("time"))]
