"""Who failed first: a file of each rank that fails, `failures/attempt_0_rank_00003.json`, and what they say together.

When one rank fails, the others fail too, a moment later, with a broken connection: these follow.
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
# What gloo and NCCL say of a rank that is gone.
_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "gloo/transport", "NCCL error")


@dataclass(frozen=True)
class Failure:
    """The end of a rank: where it was, with what it failed, and which rank it knows to be the first (itself; another
    that the watchdog found; or None, of one that only saw its connections break)."""

    rank: int
    host: str
    attempt: int
    time: float
    stage: str
    step: int | None
    error: str
    trace: list[str]
    first: int | None
    line: str  # what there is to say of the first, where it is known


def of_exception(error: BaseException, place: Place, now: float) -> Failure:
    """This rank's failure with an exception."""
    name = type(error).__name__
    told = f"{name}: {' '.join(str(error).split())}" if str(error) else name
    follows = is_of_another_rank(error)
    rank, host = process_info.rank(), process_info.host()
    return Failure(
        rank,
        host,
        process_info.attempt(),
        now,
        place.stage,
        place.step,
        told,
        traceback.format_exception(error),
        None if follows else rank,
        "" if follows else f"rank {rank} on {host} failed first, in {place}: {told}",
    )


def is_of_another_rank(error: BaseException) -> bool:
    """Whether an exception only says that some other rank is gone or does not answer."""
    return isinstance(error, RankZeroFailed | dist.DistError) or any(words in str(error) for words in _CONNECTION)


def write(run_dir: Path, failure: Failure) -> None:
    """Leave the record; where the disk does not take it, there is none."""
    path = run_dir / FOLDER / f"attempt_{failure.attempt}_rank_{failure.rank:05d}.json"
    with contextlib.suppress(Exception):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(failure))


def read(run_dir: Path, since: float) -> list[Failure]:
    """The records from `since` on, by the clock, the earliest first. Not those of an attempt: after a failure the
    torchruns of several machines do not count alike."""
    found = []
    for path in (run_dir / FOLDER).glob("attempt_*_rank_*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # being removed
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted((one for one in found if one.time >= since), key=lambda failure: failure.time)


def first_of(failures: Sequence[Failure]) -> Failure | None:
    """The record that knows who was first: the earliest that a rank left of itself, or else the earliest about another;
    None where all only followed."""
    knowing = [failure for failure in failures if failure.line]
    of_itself = [failure for failure in knowing if failure.first == failure.rank]
    return next(iter(of_itself or knowing), None)


def forget(run_dir: Path) -> None:
    """Remove what this rank left in this attempt or a later one: of an earlier command in the same folder."""
    for path in (run_dir / FOLDER).glob(f"attempt_*_rank_{process_info.rank():05d}.json"):
        number = path.name.split("_")[1]
        if number.isdigit() and int(number) >= process_info.attempt():
            path.unlink(missing_ok=True)
