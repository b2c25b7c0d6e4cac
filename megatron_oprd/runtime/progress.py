"""Where this process stands: the stage it is in, the training step, and when it last got further.

One for the whole process, as there is one watchdog that reads it from a thread of its own. No communication.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A stage, and the training step that it belongs to, if any."""

    stage: str = "start"
    step: int | None = None

    def __str__(self) -> str:
        return self.stage if self.step is None else f"{self.stage} of step {self.step}"


_place = Place()
_last = time.monotonic()


def enter(stage: str, step: int | None = None) -> None:
    """Be in `stage` from now on: of `step`, or of none."""
    global _place
    _place = Place(stage, step)
    beat()


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Be in a stage of the current step inside the block, then again in the one around it. A block that raises leaves
    its stage: that is where the process failed."""
    before = _place
    enter(name, before.step)
    yield
    enter(before.stage, before.step)


def beat() -> None:
    """Say that the stage gets on. Cheap: for inner loops."""
    global _last
    _last = time.monotonic()


def here() -> Place:
    """The stage that the process is in, or failed in."""
    return _place


def seconds_without_progress() -> float:
    """Since the last change of stage or beat."""
    return time.monotonic() - _last


class Stopwatch:
    """Seconds of the stages of a step and of the whole."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """The block is the stage `part`, and takes its time."""
        begin = time.perf_counter()
        with stage(part):
            yield
        self._parts[part] = time.perf_counter() - begin

    def seconds(self) -> dict[str, float]:
        """`time/<part>` for each part, and `time/step`."""
        parts = {f"time/{part}": seconds for part, seconds in self._parts.items()}
        return parts | {"time/step": time.perf_counter() - self._begin}
