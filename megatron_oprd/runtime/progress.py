"""Track the progress of this process: its stage, its training step and the time of its last progress.

The state is global to the process, because the watchdog inspects it from another thread. No communication.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_oprd.runtime import start_profile


@dataclass(frozen=True)
class Place:
    """A stage and its training step (None: outside of a step)."""

    stage: str = "start"
    step: int | None = None

    def __str__(self) -> str:
        return self.stage if self.step is None else f"{self.stage} of step {self.step}"


_place = Place()
_last = time.monotonic()


def enter(stage: str, step: int | None = None) -> None:
    """Start a stage, of a training step or of none."""
    global _place
    _place = Place(stage, step)
    start_profile.enter(stage)
    beat()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Run the block as a stage of the current step, then return to the stage around it.

    If the block raises, its stage stays the current one, because the process failed in it.
    """
    before = _place
    enter(name, before.step)
    yield
    enter(before.stage, before.step)


def beat() -> None:
    """Record progress within the stage. Cheap enough for inner loops."""
    global _last
    _last = time.monotonic()


def here() -> Place:
    """Return the stage in which the process is or failed."""
    return _place


def seconds_without_progress() -> float:
    """Return the seconds since the last change of stage or `beat`."""
    return time.monotonic() - _last


class Stopwatch:
    """Measure the seconds of a training step and of its stages."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Run the block as the stage `part` and measure its time."""
        begin = time.perf_counter()
        with stage(part):
            yield
        self._parts[part] = time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """Return the metrics `time/<part>` of each stage and `time/step`."""
        parts = {f"time/{part}": seconds for part, seconds in self._parts.items()}
        return parts | {"time/step": time.perf_counter() - self._begin}
