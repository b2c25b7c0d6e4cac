"""Heartbeats: each rank keeps replacing one small file, `heartbeats/rank_00003.json`. No communication.

The watchdog writes the file of its own rank, and reads the files of other ranks when its rank makes no progress.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_oprd.resilience import process_info
from megatron_oprd.runtime.progress import Place

FOLDER = "heartbeats"


@dataclass(frozen=True)
class Heartbeat:
    """The content of a heartbeat file."""

    rank: int
    host: str
    pid: int
    attempt: int  # restarts by torchrun before this process
    step: int | None
    stage: str
    where: str  # position of the thread that trains: "file:line in function"
    waits: bool  # True if that thread waits for other ranks
    seconds_without_progress: float
    time: float  # of writing, in seconds since the epoch by the clock of the rank's machine

    @property
    def place(self) -> Place:
        """The stage and step that the rank is in."""
        return Place(self.stage, self.step)


def path_of(run_dir: Path, rank: int) -> Path:
    """Return the path of a rank's heartbeat file."""
    return run_dir / FOLDER / f"rank_{rank:05d}.json"


def current(thread: int, place: Place, seconds_without_progress: float, now: float) -> Heartbeat:
    """Return this rank's heartbeat. `thread`: identifier of the thread that trains."""
    position = process_info.position(thread)
    return Heartbeat(
        rank=process_info.rank(),
        host=process_info.host(),
        pid=os.getpid(),
        attempt=process_info.attempt(),
        step=place.step,
        stage=place.stage,
        where=position.where,
        waits=position.waits,
        seconds_without_progress=round(seconds_without_progress, 3),
        time=now,
    )


def write(run_dir: Path, heartbeat: Heartbeat) -> None:
    """Replace the rank's file. A disk error is ignored: training itself will report it."""
    path = path_of(run_dir, heartbeat.rank)
    temporary = path.with_suffix(".tmp")
    with contextlib.suppress(OSError):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dataclasses.asdict(heartbeat)) + "\n", encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def read(run_dir: Path, rank: int) -> Heartbeat | None:
    """Return the last heartbeat of a rank, or None for a rank that has just started or ended by itself."""
    try:
        return Heartbeat(**json.loads(path_of(run_dir, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove(run_dir: Path, rank: int) -> None:
    """Remove the file of a rank that ends by itself. A remaining file is the sign of a killed process."""
    with contextlib.suppress(OSError):
        path_of(run_dir, rank).unlink(missing_ok=True)
        (run_dir / FOLDER).rmdir()  # succeeds for the last rank only


def remove_surplus(run_dir: Path, world_size: int) -> None:
    """Remove the files of ranks from `world_size` on, which an earlier run with more ranks left in the folder."""
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        number = path.stem.removeprefix("rank_")
        if number.isdigit() and int(number) >= world_size:
            path.unlink(missing_ok=True)


class LocalRanks:
    """The processes of the other ranks on this machine. A killed process is noticed without waiting for a time-out."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._alive: dict[int, Heartbeat] = {}

    def update(self) -> None:
        """Remember each rank whose process runs. The file of a process never seen running is from an earlier run."""
        for rank in process_info.local_ranks():
            found = read(self._run_dir, rank) if rank != process_info.rank() else None
            if found is not None and found.host == process_info.host() and process_info.is_alive(found.pid):
                self._alive[rank] = found

    def find_killed(self) -> Heartbeat | None:
        """Return the last heartbeat of a rank whose process ended without removing its file, or None."""
        for rank, last in self._alive.items():
            found = read(self._run_dir, rank)
            if found is not None and found.pid == last.pid and not process_info.is_alive(found.pid):
                return found
        return None
