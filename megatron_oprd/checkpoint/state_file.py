"""The file `state.json` of a checkpoint: the position of the run, and the models with which it was made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pydantic

from megatron_oprd.checkpoint.pending_rollouts import PendingEntry, PromptsEntry
from megatron_oprd.runtime.files import read_json
from megatron_oprd.training.state import BestEvaluation, Identity, LayerSquares
from megatron_oprd.types import UserError

FILE = "state.json"
REMOVE = "remove this checkpoint to continue from the one before"  # nobody can copy a checkpoint that this run made


@dataclass(frozen=True)
class StudentEntry:
    """The student with which the run of a checkpoint began."""

    path: str
    hash: str


@dataclass(frozen=True)
class StateFile:
    """The content of state.json."""

    __pydantic_config__ = pydantic.ConfigDict(strict=True, allow_inf_nan=False)

    step: int
    prompts: PromptsEntry
    teachers: dict[str, Identity]
    student: StudentEntry | None = None  # older checkpoints do not name their student
    best: BestEvaluation | None = None
    layer_squares: LayerSquares | None = None
    pending: PendingEntry | None = None
    teacher_in_fp8: bool | None = None

    def find_problem(self, name: str) -> str | None:
        """Return which values the checkpoint with this folder name cannot have, or None."""
        counts = {"step": self.step, "prompts.epoch": self.prompts.epoch, "prompts.position": self.prompts.position}
        counts |= {f"prompts.of_source.{source}": taken for source, taken in self.prompts.of_source.items()}
        if self.best is not None:
            counts |= {"best.step": self.best.step, "best.later": self.best.later}
        if self.pending is not None:
            counts["pending.version"] = self.pending.version
        negative = next((f"{key} is {value}" for key, value in counts.items() if value < 0), None)
        if negative is None and name != f"step_{self.step:07d}":
            return f"step {self.step} is not that of {name}"
        if negative is None and self.best is not None and self.best.step > self.step:
            return f"best.step {self.best.step} is later than step {self.step}"
        if negative is None and self.layer_squares is not None:
            compared = {student for teacher in self.teachers.values() for student, _ in teacher.pairs}
            if self.layer_squares.steps < 1 or self.layer_squares.means.keys() != compared:
                return f"layer_squares has no means of the layers {sorted(compared)}"
            if min(self.layer_squares.means.values(), default=1) <= 0:
                return "layer_squares.means has a value that is not above 0"
        return negative


def read_state_file(checkpoint: Path) -> StateFile:
    """Return the content of state.json in the folder of a checkpoint. No communication.

    Raises:
        UserError: the file cannot be read, a key is missing or has another type, or the values contradict each other.
    """
    path = checkpoint / FILE
    try:
        values = read_json(path)
    except UserError as error:
        if not error.advice:  # a file that the disk does not give
            raise
        raise UserError(error.message, REMOVE) from None
    try:
        # Strict JSON has arrays where the dataclasses have tuples.
        state = pydantic.TypeAdapter(StateFile).validate_json(json.dumps(values))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        problem: str | None = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    else:
        problem = state.find_problem(checkpoint.name)
    if problem:
        raise UserError(f"{path} cannot be read ({problem})", REMOVE)
    return state
