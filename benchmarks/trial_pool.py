"""Run trials as processes, several at the same time, until a time limit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")


class TrialFailed(Exception):
    """A trial ended with another exit code than 0."""


class TimeIsUp(Exception):
    """A trial was stopped at the time limit."""


class TrialPool:
    """Runs functions that start trials, and begins none that cannot end before the limit.

    Args:
        parallel: trials at the same time.
        minutes: the limit, counted from now; None: no limit.
    """

    def __init__(self, parallel: int, minutes: float | None) -> None:
        self.parallel = parallel
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.durations: list[float] = []  # seconds of the finished trials
        self.processes: set[int] = set()  # ids of the running trials

    @property
    def seconds_left(self) -> float | None:
        """Return the seconds until the limit, or None without one."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def run(
        self,
        pending: Sequence[Job],
        ready: Callable[[Job], bool],
        trial: Callable[[Job], None],
        done: Callable[[], None],
    ) -> int:
        """Run `trial` for each job, the first that is ready first, and return the number of failed trials.

        Stops when the first `parallel` trials have all failed, since the others would fail too.

        Args:
            ready: returns True if a job can begin; some need the figures of others.
            done: is called in this thread after each finished trial.
        """
        waiting, failed, running = list(pending), 0, dict[Future[None], Job]()
        with ThreadPoolExecutor(self.parallel) as threads, self._killed_on_exception():
            while waiting or running:
                while len(running) < self.parallel and self._has_time():
                    job = next((job for job in waiting if ready(job)), None)
                    if job is None:
                        break
                    waiting.remove(job)
                    running[threads.submit(self._timed, trial, job)] = job
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        future.result()
                    except TimeIsUp:
                        print(f"{job}: stopped at the time limit", flush=True)
                    except TrialFailed as error:
                        failed += 1
                        print(f"{job}: {error}", flush=True)
                    else:
                        done()
                if failed >= self.parallel and not self.durations:
                    break
        for job in waiting:
            print(f"{job}: not begun", flush=True)
        return failed

    @contextlib.contextmanager
    def _killed_on_exception(self) -> Iterator[None]:
        """Kill the running trials if the block raises, as Ctrl-C does."""
        try:
            yield
        except BaseException:
            for process in list(self.processes):
                self._kill(process)
            raise

    def _has_time(self) -> bool:
        left = self.seconds_left
        return left is None or left > (statistics.median(self.durations) if self.durations else 0.0)

    def _timed(self, trial: Callable[[Job], None], job: Job) -> None:
        begin = time.monotonic()
        trial(job)
        self.durations.append(time.monotonic() - begin)

    def run_process(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> tuple[float, float]:
        """Run a command with its output in `log`, and return its user seconds and its wall seconds.

        Raises TrialFailed with the error in the log, or TimeIsUp at the limit.
        """
        begin = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        self.processes.add(process.pid)
        timer = threading.Timer(self.seconds_left or 0.0, self._kill, [process.pid])
        if self.deadline is not None:
            timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)  # with the user time of the processes that it waited for
        finally:
            timer.cancel()
        killed = process.pid not in self.processes
        self.processes.discard(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if killed:
            raise TimeIsUp
        if process.returncode:
            raise TrialFailed(f"exit code {process.returncode}: {error_line(log.read_text())} (see {log})")
        return usage.ru_utime, time.perf_counter() - begin

    def _kill(self, process: int) -> None:
        """End a trial and the processes that it started."""
        self.processes.discard(process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


def error_line(output: str) -> str:
    """Return the last line of an output that names an error, or the last line at all."""
    lines = output.strip().splitlines() or ["no output"]
    return next((line for line in reversed(lines) if re.search(r"(?i)error\b", line)), lines[-1])[:300]
