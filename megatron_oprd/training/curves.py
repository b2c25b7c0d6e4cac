"""Curves of the metrics: what the run log needs of a program that draws them, and TensorBoard."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_oprd.runtime.files import explain_os_errors


class CurveWriter(Protocol):
    """A program that draws metrics over the steps. One rank calls the methods."""

    def open(self, last: int) -> None:
        """Begin the curves, or continue those of an earlier process after the step `last` (-1: a new run)."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to the curve of each metric."""

    def close(self) -> None:
        """Write everything that is buffered."""


class TensorBoardCurves:
    """Writes event files for TensorBoard to `tensorboard/` in the run folder."""

    def __init__(self, run_dir: Path) -> None:
        self._folder = run_dir / "tensorboard"
        self._board: Any = None

    def open(self, last: int) -> None:
        """Open an event file that hides the points after `last`, which a killed process left behind."""
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _ignore_tensorboard_errors
        self._board = SummaryWriter(str(self._folder), purge_step=last + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Add a point at `step` to the curve of each metric."""
        with explain_os_errors(self._folder):
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
            self._board.flush()  # a process killed later resumes after this step and will not draw it again

    def close(self) -> None:
        """Close the event file."""
        with explain_os_errors(self._folder):
            self._board.close()


def _ignore_tensorboard_errors(args: threading.ExceptHookArgs) -> None:
    """Print no traceback when tensorboard's thread meets a full disk: its next call raises the error."""
    if not (type(args.thread).__module__.startswith("tensorboard.") and isinstance(args.exc_value, OSError)):
        threading.__excepthook__(args)
