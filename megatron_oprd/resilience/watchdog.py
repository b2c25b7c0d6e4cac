"""The watchdog: a thread of each rank that writes heartbeats and ends the process when the run cannot continue.

The thread ends the process itself because the main thread may wait in C code forever for a rank that is gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_oprd.config import WatchdogConfig
from megatron_oprd.resilience import failures, heartbeat, process_info
from megatron_oprd.resilience.heartbeat import Heartbeat, LocalRanks
from megatron_oprd.resilience.verdict import RankStatus, Verdict, judge
from megatron_oprd.runtime import progress

# Between the failure of another rank and the end of this one: the main thread may meanwhile report a lost connection.
GRACE_SECONDS = 5.0


class Watchdog:
    """Writes this rank's heartbeat every `heartbeat_seconds` and watches the other ranks.

    The watchdog calls `end` on its own thread, which must not return, in two cases: another rank has failed, or this
    rank makes no progress for `timeout_seconds` and `judge` finds the rank that holds it up. The files of other ranks
    are read only while this rank makes no progress. Ranks communicate only through the run folder, which all share.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path, since: float, end: Callable[[Verdict], None]) -> None:
        """Prepare the thread. `since`: failure records written before this time belong to an earlier run."""
        self._interval = min(config.heartbeat_seconds, config.timeout_seconds / 6)
        self._timeout = config.timeout_seconds
        self._run_dir, self._since = run_dir, since
        self._end = end
        self._worker = threading.get_ident()
        self._local = LocalRanks(run_dir)
        self._seen: dict[int, tuple[float | None, float]] = {}  # rank -> (time of its heartbeat, time we first saw it)
        self._failed_since: float | None = None
        self._next_look = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Write the first heartbeat and start the thread."""
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread and wait until it has ended."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def find_killed(self) -> Verdict | None:
        """Return a rank of this machine whose process ended without leaving a record, or None."""
        self._local.update()
        last = self._local.find_killed()
        if last is None:
            return None
        return Verdict(last.rank, f"rank {last.rank} on {last.host} was killed, last seen in {last.place}")

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._beat()
            found = self._find_failed() or self._find_hanging()
            if found is not None and not self._stopped.is_set():
                self._end(found)

    def _beat(self) -> Heartbeat:
        beat = heartbeat.current(self._worker, progress.here(), progress.seconds_without_progress(), time.time())
        heartbeat.write(self._run_dir, beat)
        return beat

    def _find_failed(self) -> Verdict | None:
        """Return the rank that failed or was killed, once GRACE_SECONDS have passed."""
        first = failures.first_failure(failures.read(self._run_dir, self._since))
        found = Verdict(first.first, first.line) if first is not None else self.find_killed()
        if found is None:
            self._failed_since = None
            return None
        self._failed_since = self._failed_since or time.monotonic()
        return found if time.monotonic() - self._failed_since >= GRACE_SECONDS else None

    def _find_hanging(self) -> Verdict | None:
        """Return the rank that holds up this one, once this rank made no progress for the time-out."""
        late, now = progress.seconds_without_progress(), time.monotonic()
        if late < self._timeout / 2:
            self._seen.clear()
            return None
        if now < self._next_look:
            return None
        self._next_look = now + self._timeout / 6  # seldom: every waiting rank reads the files of all ranks
        records = failures.read(self._run_dir, self._since)
        ended = {process_info.rank(), *(record.rank for record in records)}
        others = [self._status(rank) for rank in range(process_info.world_size()) if rank not in ended]
        if late < self._timeout or failures.first_failure(records) is not None:
            return None
        return judge(
            [RankStatus(process_info.rank(), self._beat()), *others],
            self._timeout,
            max(3 * self._interval, self._timeout / 3),
        )

    def _status(self, rank: int) -> RankStatus:
        last, now = heartbeat.read(self._run_dir, rank), time.monotonic()
        written = last.time if last is not None else None
        if rank not in self._seen or self._seen[rank][0] != written:
            self._seen[rank] = (written, now)
        return RankStatus(rank, last, now - self._seen[rank][1])
