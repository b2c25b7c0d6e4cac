"""Signs of life: one small file a rank, `heartbeats/rank_00003.json`, replaced all the time. No communication."""

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
    """What a rank says of itself."""

    rank: int
    host: str
    pid: int
    attempt: int
    step: int | None
    stage: str
    where: str  # of its thread of work: file:line in function
    waits: bool  # for other ranks, there
    seconds_without_progress: float
    time: float  # when this was written, by the clock of its machine

    @property
    def place(self) -> Place:
        return Place(self.stage, self.step)


def path_of(run_dir: Path, rank: int) -> Path:
    return run_dir / FOLDER / f"rank_{rank:05d}.json"


def write(run_dir: Path, heartbeat: Heartbeat) -> None:
    """Replace this rank's file. A disk that does not take it is not the watchdog's to complain about."""
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
    """The last one of a rank; None of one that has begun to run just now, or ended by itself."""
    try:
        return Heartbeat(**json.loads(path_of(run_dir, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remove(run_dir: Path, rank: int) -> None:
    """What a rank does that ends by itself: a file that is left tells of a process that was killed."""
    with contextlib.suppress(OSError):
        path_of(run_dir, rank).unlink(missing_ok=True)
        (run_dir / FOLDER).rmdir()  # of the last one


def remove_others(run_dir: Path, world_size: int) -> None:
    """Drop the files of ranks that an earlier, larger run of the folder had."""
    for path in (run_dir / FOLDER).glob("rank_*.json"):
        number = path.stem.removeprefix("rank_")
        if number.isdigit() and int(number) >= world_size:
            path.unlink(missing_ok=True)


class LocalRanks:
    """The other ranks on this machine, by their processes: one that is gone needs no time-out to be missed."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._alive: dict[int, Heartbeat] = {}

    def look(self) -> None:
        """Take note of who is there. A file of a process that this one never saw running is an earlier run's."""
        for rank in process_info.local_ranks():
            found = read(self._run_dir, rank) if rank != process_info.rank() else None
            if found is not None and found.host == process_info.host() and process_info.is_alive(found.pid):
                self._alive[rank] = found

    def gone(self) -> Heartbeat | None:
        """The last heartbeat of a rank whose process ended without removing its file."""
        for rank, last in self._alive.items():
            found = read(self._run_dir, rank)
            if found is not None and found.pid == last.pid and not process_info.is_alive(found.pid):
                return found
        return None


def own(thread: int, place: Place, seconds_without_progress: float, now: float) -> Heartbeat:
    """This rank's, of the thread that does the work."""
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
