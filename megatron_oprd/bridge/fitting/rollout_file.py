"""Store the student's answers step by step, in the format of `rollout.engine=replay`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_oprd.rollout.replay import parse_rollout, replay_record
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.types import Rollout


class RolloutFile:
    """A JSONL file with `per_step` rollouts for each step. Only one rank may use it.

    Each method raises UserError if the disk cannot be read or written.
    """

    def __init__(self, path: Path, per_step: int) -> None:
        self.path = path
        self.per_step = per_step
        self._starts = [0]  # the byte at which each step starts, and the end of the last

    @property
    def steps(self) -> int:
        """The number of complete steps in the file."""
        return len(self._starts) - 1

    def open(self) -> int:
        """Count the complete steps, delete an incomplete step at the end of the file, and return `steps`."""
        self._starts, lines = [0], 0
        with explain_os_errors(self.path), self.path.open("a+b") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                lines += 1
                if lines % self.per_step == 0:
                    self._starts.append(file.tell())
            file.truncate(self._starts[-1])
        return self.steps

    def append(self, rollouts: Sequence[Rollout]) -> None:
        """Append the rollouts of the next step and flush them to the disk.

        Raises:
            ValueError: there are not `per_step` rollouts.
        """
        if len(rollouts) != self.per_step:
            raise ValueError(f"{len(rollouts)} rollouts for a step of {self.per_step}")
        with explain_os_errors(self.path), self.path.open("ab") as file:
            for rollout in rollouts:
                file.write(json.dumps(replay_record(rollout)).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._starts.append(file.tell())

    def read(self, step: int) -> list[Rollout]:
        """Return the rollouts of a step, counted from 0."""
        start, end = self._starts[step : step + 2]
        with self.path.open("rb") as file:
            file.seek(start)
            lines = file.read(end - start).splitlines()
        return [parse_rollout(line, step * self.per_step + number) for number, line in enumerate(lines)]
