"""Failure records: each failing rank leaves one file, `failures/attempt_0_rank_00003.json`. No communication.

When one rank fails, the other ranks fail a moment later with broken connections. `first_failure` finds the rank that
failed first among all records.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_oprd.parallel.rank_zero import RankZeroFailed
from megatron_oprd.resilience import process_info
from megatron_oprd.runtime.files import write_json
from megatron_oprd.runtime.progress import Place

FOLDER = "failures"
# Phrases of gloo and NCCL errors that mean: another rank is gone.
_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "NCCL error")


@dataclass(frozen=True)
class Failure:
    """The content of a failure record: the end of one rank."""

    rank: int
    host: str
    attempt: int  # restarts by torchrun before this process
    time: float  # seconds since the epoch
    stage: str
    step: int | None
    error: str
    trace: list[str]
    first: int | None  # the rank that failed first: this rank, one that the watchdog found, or None if unknown
    line: str  # the message about the first failure; empty if unknown


def from_exception(error: BaseException, place: Place, now: float) -> Failure:
    """Return the record of this rank failing with an exception."""
    name = type(error).__name__
    text = f"{name}: {' '.join(str(error).split())}" if str(error) else name
    follows = follows_another_failure(error)
    rank, host = process_info.rank(), process_info.host()
    return Failure(
        rank,
        host,
        process_info.attempt(),
        now,
        place.stage,
        place.step,
        text,
        traceback.format_exception(error),
        None if follows else rank,
        "" if follows else f"rank {rank} on {host} failed first, in {place}: {text}",
    )


def follows_another_failure(error: BaseException) -> bool:
    """Return True if an exception only means that another rank is gone or does not answer."""
    return isinstance(error, RankZeroFailed | dist.DistError) or any(words in str(error) for words in _CONNECTION)


def write(run_dir: Path, failure: Failure) -> None:
    """Write a record. A disk error is ignored: the failure itself must be reported."""
    path = run_dir / FOLDER / f"attempt_{failure.attempt}_rank_{failure.rank:05d}.json"
    with contextlib.suppress(Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(failure))


def read(run_dir: Path, since: float) -> list[Failure]:
    """Return the records written from the time `since` on, in the order of their times.

    Records are selected by time and not by attempt: the torchruns of several machines may count restarts differently.
    """
    found = []
    for path in (run_dir / FOLDER).glob("attempt_*_rank_*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # another process may be removing the file
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted((failure for failure in found if failure.time >= since), key=lambda failure: failure.time)


def first_failure(failures: Sequence[Failure]) -> Failure | None:
    """Return the record that names the first failure, or None if every rank only lost its connections.

    Args:
        failures: records in the order of their times. A rank's record about itself wins over records about others.
    """
    with_cause = [failure for failure in failures if failure.line]
    about_itself = [failure for failure in with_cause if failure.first == failure.rank]
    return next(iter(about_itself or with_cause), None)


def remove_own(run_dir: Path) -> None:
    """Remove this rank's records of the current and later attempts, which an earlier command left in the folder."""
    for path in (run_dir / FOLDER).glob(f"attempt_*_rank_{process_info.rank():05d}.json"):
        number = path.name.split("_")[1]
        if number.isdigit() and int(number) >= process_info.attempt():
            path.unlink(missing_ok=True)
