"""The guard around the work of a command on every rank: a watchdog, and a record of the rank that failed first.

`train`, `evaluate` and `bridge.fit` run inside `with guarded(...)`.
"""

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
from megatron_oprd.resilience.other_command import check_no_other_command
from megatron_oprd.resilience.verdict import Verdict
from megatron_oprd.resilience.watchdog import Watchdog
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.cli import RankFailed
from megatron_oprd.runtime.files import DISK_ERRORS
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

# A rank that only lost its connections waits this long for the record of the rank that failed first.
SETTLE_SECONDS = 5.0
# A rank that failed itself waits this long for a record of an earlier failure.
COMPARE_SECONDS = 0.5
# The clocks of two machines may differ by this much. A process that torchrun restarts needs longer to get here.
CLOCKS_SECONDS = 3.0


@contextlib.contextmanager
def guarded(config: WatchdogConfig, run_dir: Path, *, alone: bool = False) -> Iterator[None]:
    """Run the work of a command: write heartbeats, and end all ranks when one fails or hangs.

    If one of several ranks fails, each rank writes a record to `failures/` in the run folder and prints one line with
    the first rank that failed and its stage. A UserError, and the exception of a single process, are raised unchanged.
    Ranks communicate only through the run folder.

    Args:
        config: the section `watchdog`.
        run_dir: the run folder.
        alone: True if no other command may work in the run folder meanwhile.

    Raises:
        UserError: another command works in the run folder (`alone`).
        RankFailed: one of several ranks failed.
    """
    if alone and config.heartbeat_seconds and process_info.rank() == 0:
        check_no_other_command(run_dir, config.heartbeat_seconds)
    guard = _Guard(config, run_dir)
    guard.begin()
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        guard.end()
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        is_user_error = isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)
        if is_user_error:
            guard.record_user_error(error)
        elif process_info.world_size() > 1:
            guard.fail(error)
        else:
            failures.write(run_dir, failures.from_exception(error, progress.here(), time.time()))
        guard.end()
        raise
    guard.end()


class _Guard:
    """The watchdog and the files of one rank during a command."""

    def __init__(self, config: WatchdogConfig, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._new_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        if run_dir.is_dir() and {path.name for path in run_dir.iterdir()} <= {heartbeat.FOLDER}:
            self._new_folders = [run_dir]  # another rank of this command has just made the folder
        self._ending = threading.Lock()  # the first thread that ends the process, main or watchdog, keeps it
        self._since = time.time() - CLOCKS_SECONDS
        self._watchdog = Watchdog(config, run_dir, self._since, self._end_process)
        self._has_watchdog = config.heartbeat_seconds > 0

    def begin(self) -> None:
        """Remove the files of an earlier command and start the watchdog."""
        failures.remove_own(self._run_dir)
        if process_info.rank() == 0:
            heartbeat.remove_surplus(self._run_dir, process_info.world_size())
        if self._has_watchdog:
            self._watchdog.start()

    def end(self) -> None:
        """Stop the watchdog, and remove the heartbeat and the empty folders that this command made."""
        self._ending.acquire()
        if self._has_watchdog:
            self._watchdog.stop()
        heartbeat.remove(self._run_dir, process_info.rank())
        for folder in self._new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def record_user_error(self, error: BaseException) -> None:
        """Write a record of a user's mistake that this rank alone may have found.

        The command itself prints the mistake on rank 0 only: another rank prints it here, unless rank 0 found it too.
        """
        rank, on_all_ranks = process_info.rank(), getattr(error, "everywhere", False)
        # Before the process group exists, all ranks make the same checks.
        if on_all_ranks or process_info.world_size() == 1 or not dist.is_initialized():
            return
        failures.write(self._run_dir, failures.from_exception(error, progress.here(), time.time()))
        time.sleep(0 if rank == 0 else COMPARE_SECONDS)
        if rank != 0 and all(failure.first != 0 for failure in failures.read(self._run_dir, self._since)):
            _print_error(error_line(error, None))

    def fail(self, error: BaseException) -> NoReturn:
        """Write this rank's failure record, print the first failure, and raise RankFailed."""
        self._ending.acquire()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the remaining ranks, which end anyway
        own = failures.from_exception(error, progress.here(), time.time())
        failures.write(self._run_dir, own)
        line = self._find_first(own)
        self._report(own, line)
        heartbeat.remove(self._run_dir, own.rank)
        raise RankFailed(line) from error

    def _find_first(self, own: Failure) -> str:
        """Return the message about the first rank that failed, after waiting for the records of other ranks."""
        deadline = time.monotonic() + (COMPARE_SECONDS if own.line else SETTLE_SECONDS)
        while True:
            records = failures.read(self._run_dir, self._since)
            first, late = failures.first_failure(records), time.monotonic() > deadline
            if first is not None and (late or not own.line):
                return first.line
            killed = None if own.line else self._watchdog.find_killed()
            if killed is not None:
                return killed.line
            if late:
                return own.line or self._describe_missing(records)
            time.sleep(0.1)

    def _describe_missing(self, records: list[Failure]) -> str:
        """Return a message about the ranks that left no record, for the case that no record names a cause."""
        missing = sorted(set(range(process_info.world_size())) - {record.rank for record in records})
        if not missing:
            return "no rank left a record of the cause"
        last = heartbeat.read(self._run_dir, missing[0])
        seen = f" on {last.host}, last seen in {last.place}" if last is not None else ""
        more = f", {len(missing) - 1} more too" if missing[1:] else ""
        return f"rank {missing[0]}{seen} left no record{more}: killed, or its machine is gone"

    def _end_process(self, found: Verdict) -> None:
        """End this process from the watchdog's thread, whatever the main thread does."""
        if not self._ending.acquire(blocking=False):
            return
        place, rank = progress.here(), process_info.rank()
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        own = Failure(
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
        failures.write(self._run_dir, own)
        self._report(own, found.line)
        heartbeat.remove(self._run_dir, rank)
        # Flush in a thread of its own: the main thread may hang in a write and hold stdout's lock.
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(timeout=1.0)
        os._exit(1)

    def _report(self, own: Failure, line: str) -> None:
        """Print the message about the first failure; the rank that failed first prints its stack trace before."""
        if own.first != own.rank or own.line != line:
            _print_error(f"rank {own.rank} ends, as {line}")
            return
        os.write(2, "".join(own.trace).encode())
        _print_error(line)
        _report_to_torchrun(line)


def _print_error(line: str) -> None:
    """Print in one unbuffered write: lines of several ranks do not mix, and no other thread can hold a lock."""
    os.write(2, f"error: {line}\n".encode())


def _report_to_torchrun(line: str) -> None:
    """Write torchrun's error file. Only the first rank writes one: torchrun's summary names the earliest file."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    with contextlib.suppress(OSError):
        get_error_handler().record_exception(RuntimeError(line))
