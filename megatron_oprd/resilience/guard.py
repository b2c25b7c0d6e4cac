"""What stands around the work of a command on every rank: a watchdog, and the record of who failed first."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_oprd.config import WatchdogConfig
from megatron_oprd.resilience import failures, heartbeat, process_info
from megatron_oprd.resilience.failures import Failure
from megatron_oprd.resilience.verdict import Verdict
from megatron_oprd.resilience.watchdog import Watchdog
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.cli import RankFailed
from megatron_oprd.runtime.files import DISK_ERRORS
from megatron_oprd.types import UserError

# How long a rank that only lost its connections waits to hear who failed; one that failed itself, whether it was first.
SETTLE_SECONDS, COMPARE_SECONDS = 5.0, 0.5
# By how much the clocks of two machines may differ. A process that torchrun starts anew needs longer to get here.
CLOCKS_SECONDS = 3.0


@contextlib.contextmanager
def guarded(config: WatchdogConfig, run_dir: Path) -> Iterator[None]:
    """Do the work of a command inside: with heartbeats of this rank in the run folder, and with an end for all ranks
    when one fails or hangs.

    A failure of one among several ranks is written to `failures/` in the run folder, the rank that failed first and its
    stage are named in one line, and RankFailed is raised. A mistake of the user, and the failure of a process that is
    alone, pass as they are. No communication but through the folder.
    """
    guard = _Guard(config, run_dir)
    guard.begin()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        guard.end()
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        told = isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)
        if told:
            guard.refuse(error)
        elif process_info.world_size() > 1:
            guard.fail(error)
        else:
            failures.write(run_dir, failures.of_exception(error, progress.here(), time.time()))
        guard.end()
        raise
    guard.end()


class _Guard:
    def __init__(self, config: WatchdogConfig, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._new = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= {heartbeat.FOLDER}:
            self._new = [run_dir]  # another rank was faster
        self._decided = threading.Lock()  # of the main thread and the watchdog's, the first to end takes it for good
        self._since = time.time() - CLOCKS_SECONDS
        self._watchdog = Watchdog(config, run_dir, self._since, self._end_now)
        self._beats = config.heartbeat_seconds > 0

    def begin(self) -> None:
        failures.forget(self._run_dir)
        if process_info.rank() == 0:
            heartbeat.remove_others(self._run_dir, process_info.world_size())
        if self._beats:
            self._watchdog.start()

    def end(self) -> None:
        """This rank ends by itself; a command that was refused leaves no folder behind."""
        self._decided.acquire()
        if self._beats:
            self._watchdog.stop()
        heartbeat.remove(self._run_dir, process_info.rank())
        for folder in self._new:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def refuse(self, error: BaseException) -> None:
        """Leave a record where the mistake may be seen by this rank alone; the command says it on rank 0 only."""
        rank, everywhere = process_info.rank(), getattr(error, "everywhere", False)
        if everywhere or process_info.world_size() == 1 or not dist.is_initialized():  # till then all check the same
            return
        failures.write(self._run_dir, failures.of_exception(error, progress.here(), time.time()))
        time.sleep(0 if rank == 0 else COMPARE_SECONDS)
        if rank != 0 and all(one.first != 0 for one in failures.read(self._run_dir, self._since)):
            _say(" ".join(str(error).split()))

    def fail(self, error: BaseException) -> NoReturn:
        """Write down this rank's failure and say whose was first."""
        self._decided.acquire()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to all that are left; they end anyway
        mine = failures.of_exception(error, progress.here(), time.time())
        failures.write(self._run_dir, mine)
        line = self._settle(mine)
        self._tell(mine, line)
        heartbeat.remove(self._run_dir, mine.rank)
        raise RankFailed(line) from error

    def _settle(self, mine: Failure) -> str:
        """The line about the first rank that failed."""
        deadline = time.monotonic() + (COMPARE_SECONDS if mine.line else SETTLE_SECONDS)
        while True:
            records = failures.read(self._run_dir, self._since)
            first, late = failures.first_of(records), time.monotonic() > deadline
            if first is not None and (late or not mine.line):
                return first.line
            gone = None if mine.line else self._watchdog.gone()
            if gone is not None:
                return gone.line
            if late:
                return mine.line or self._missing(records)
            time.sleep(0.1)

    def _missing(self, records: list[Failure]) -> str:
        """Where nobody knows, those that could not say anything."""
        silent = sorted(set(range(process_info.world_size())) - {one.rank for one in records})
        if not silent:
            return "no rank knows why"
        last = heartbeat.read(self._run_dir, silent[0])
        seen = f" on {last.host}, last seen in {last.place}" if last is not None else ""
        more = f", {len(silent) - 1} more too" if silent[1:] else ""
        return f"rank {silent[0]}{seen} left no record{more}: killed, or its machine is gone"

    def _end_now(self, found: Verdict) -> None:
        """End this process from the watchdog's thread, wherever its main thread stands."""
        if not self._decided.acquire(blocking=False):
            return
        place, rank = progress.here(), process_info.rank()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        mine = Failure(
            rank,
            process_info.host(),
            process_info.attempt(),
            time.time(),
            place.stage,
            place.step,
            "ended by the watchdog",
            traceback.format_stack(frame) if frame is not None else [],
            found.rank,
            found.line,
        )
        failures.write(self._run_dir, mine)
        self._tell(mine, found.line)
        heartbeat.remove(self._run_dir, rank)
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)  # which a thread stuck in a write would hold up
        flush.start()
        flush.join(timeout=1.0)
        os._exit(1)

    def _tell(self, mine: Failure, line: str) -> None:
        """One line; before it, of the rank that is the first, where it failed."""
        if mine.first != mine.rank or mine.line != line:
            _say(f"rank {mine.rank} ends, as {line}")
            return
        os.write(2, "".join(mine.trace).encode())
        _say(line)
        _tell_torchrun(line)


def _say(line: str) -> None:
    """In one write, past Python's buffers: lines of several ranks do not mix, and no other thread can be in the way."""
    os.write(2, f"error: {line}\n".encode())


def _tell_torchrun(line: str) -> None:
    """torchrun's own summary takes the earliest of these files for the root cause: only the first rank leaves one."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    with contextlib.suppress(OSError):
        get_error_handler().record_exception(RuntimeError(line))
