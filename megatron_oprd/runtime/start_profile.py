"""Measure where the time from the command to the end of the first step goes: `train --profile-start`.

`begin` starts the recording; without it every function here does nothing. The state is global to the process, because
the first phases end before torch is imported. No communication.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_oprd.runtime.files import write_json

FILE = "start.json"  # in the run folder
FIRST_PHASE = "start Python, check the configuration"


@dataclass
class Phase:
    """A part of the start and the time that this process spent in it."""

    phase: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of all threads; fewer than `seconds` if the process waited for disk, device or others


class _Recording:
    def __init__(self) -> None:
        own_start, command_start = _seconds_since_start("self"), 0.0
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun, the parent, is the command
            command_start = _seconds_since_start(str(os.getppid())) - own_start
        self.phases = {"torchrun": Phase("torchrun", command_start)} if command_start > 0 else {}
        self.current = FIRST_PHASE
        self.phases[self.current] = Phase(self.current)
        self.since, self.cpu_since = time.monotonic() - own_start, 0.0

    def enter(self, name: str) -> None:
        now, cpu_now = time.monotonic(), time.process_time()
        self.phases[self.current].seconds += now - self.since
        self.phases[self.current].cpu_seconds += cpu_now - self.cpu_since
        self.phases.setdefault(name, Phase(name))
        self.current, self.since, self.cpu_since = name, now, cpu_now


_recording: _Recording | None = None


def begin(wanted: bool) -> None:
    """Record the phases from the start of the process on; under torchrun, from the start of torchrun on.

    Does nothing if no recording is wanted, on other ranks than rank 0, and while a recording is active.
    """
    global _recording
    if wanted and os.environ.get("RANK", "0") == "0":
        _recording = _recording or _Recording()


def enter(name: str) -> None:
    """End the current phase and begin the phase `name`. A phase that is entered again adds to its time."""
    if _recording is not None:
        _recording.enter(name)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Run the block as the phase `name`, then return to the phase around it."""
    around = _recording.current if _recording is not None else ""
    enter(name)
    yield
    enter(around)


def finish(run_dir: Path) -> None:
    """End the recording, print the table and write `start.json` into the run folder."""
    global _recording
    if _recording is None:
        return
    _recording.enter(_recording.current)
    phases, _recording = [one for one in _recording.phases.values() if one.seconds], None
    sums = sum(one.seconds for one in phases), sum(one.cpu_seconds for one in phases)
    total = Phase("from the command to the end of the first step", *sums)
    print("\n".join(_table([*phases, total])), flush=True)
    write_json(run_dir / FILE, {"seconds": total.seconds, "phases": [asdict(one) for one in phases]})


def _table(rows: list[Phase]) -> list[str]:
    width = max(len(row.phase) for row in rows)
    head = f"{'start':<{width}} {'seconds':>9} {'CPU s':>9}"
    rows = [row for row in rows if row.seconds >= 0.005]
    return [head, *(f"{row.phase:<{width}} {row.seconds:9.2f} {row.cpu_seconds:9.2f}" for row in rows)]


def _seconds_since_start(process: str) -> float:
    """Return the age of a process, to a hundredth of a second; 0.0 if the system does not say it."""
    with suppress(OSError, ValueError, IndexError):
        stat = Path(f"/proc/{process}/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])  # since the machine started, in field 22
        return max(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"), 0.0)
    return 0.0
