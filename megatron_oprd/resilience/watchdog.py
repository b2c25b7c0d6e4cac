"""A thread of each rank that tells the others of it, and ends it when the run cannot go on.

Its own main thread may stand in C for ever, waiting for a rank that will not come: the thread ends the process itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from megatron_oprd.config import WatchdogConfig
from megatron_oprd.resilience import failures, heartbeat, process_info
from megatron_oprd.resilience.heartbeat import Heartbeat, LocalRanks
from megatron_oprd.resilience.verdict import Sign, Verdict, judge
from megatron_oprd.runtime import progress

# Between the failure of another rank and this one's end: time to see it itself, with a broken connection.
GRACE_SECONDS = 5.0


class Watchdog:
    """Writes this rank's heartbeat every `heartbeat_seconds`, and calls `end` with what it found where a rank has
    failed since `since` (by the clock), or where this one gets no further for `timeout_seconds` and some rank is to
    blame.

    `end` is called on the watchdog's thread and does not return. The other ranks' files are read only when this rank
    is late. No communication but through the run folder, which all ranks see.
    """

    def __init__(self, config: WatchdogConfig, run_dir: Path, since: float, end: Callable[[Verdict], None]) -> None:
        self._interval = min(config.heartbeat_seconds, config.timeout_seconds / 6)
        self._timeout = config.timeout_seconds
        self._run_dir, self._since = run_dir, since
        self._end = end
        self._worker = threading.get_ident()
        self._local = LocalRanks(run_dir)
        self._seen: dict[int, tuple[float | None, float]] = {}  # of a rank: time of its heartbeat, and since when
        self._failed_since: float | None = None
        self._next_look = 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        self._beat()
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread does nothing any more."""
        self._stopped.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def gone(self) -> Verdict | None:
        """A rank of this machine whose process is gone without a word."""
        self._local.look()
        last = self._local.gone()
        if last is None:
            return None
        return Verdict(last.rank, f"rank {last.rank} on {last.host} was killed, last seen in {last.place}")

    def _run(self) -> None:
        while not self._stopped.wait(self._interval):
            self._beat()
            found = self._failed_elsewhere() or self._hang()
            if found is not None and not self._stopped.is_set():
                self._end(found)

    def _beat(self) -> Heartbeat:
        mine = heartbeat.own(self._worker, progress.here(), progress.seconds_without_progress(), time.time())
        heartbeat.write(self._run_dir, mine)
        return mine

    def _failed_elsewhere(self) -> Verdict | None:
        """A rank that has failed, when this one had its time to see it."""
        first = failures.first_of(failures.read(self._run_dir, self._since))
        found = Verdict(first.first, first.line) if first is not None else self.gone()
        if found is None:
            self._failed_since = None
            return None
        self._failed_since = self._failed_since or time.monotonic()
        return found if time.monotonic() - self._failed_since >= GRACE_SECONDS else None

    def _hang(self) -> Verdict | None:
        late, now = progress.seconds_without_progress(), time.monotonic()
        if late < self._timeout / 2:
            self._seen.clear()
            return None
        if now < self._next_look:
            return None
        self._next_look = now + self._timeout / 6  # seldom: all ranks that wait read the files of all
        records = failures.read(self._run_dir, self._since)
        ended = {process_info.rank(), *(one.rank for one in records)}
        others = [self._sign(rank) for rank in range(process_info.world_size()) if rank not in ended]
        if late < self._timeout or failures.first_of(records) is not None:
            return None
        return judge(
            [Sign(process_info.rank(), self._beat()), *others],
            self._timeout,
            max(3 * self._interval, self._timeout / 3),
        )

    def _sign(self, rank: int) -> Sign:
        last, now = heartbeat.read(self._run_dir, rank), time.monotonic()
        written = last.time if last is not None else None
        if rank not in self._seen or self._seen[rank][0] != written:
            self._seen[rank] = (written, now)
        return Sign(rank, last, now - self._seen[rank][1])
