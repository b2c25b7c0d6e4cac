"""Training checkpoints: the student's weights, the optimizer's state and the position of the run.

    checkpoints/step_0000050/   model/ optimizer/ state.json complete
                                average/ (only with teacher.ema)
                                pending_rollouts.jsonl (only if rollouts were pending)

`saver.py` writes a checkpoint under another name, forces it to the disk, renames it and then adds the file `complete`.
A process killed at any moment leaves the last complete checkpoint intact. This file finds, loads and removes them.
`model/` is a Megatron checkpoint that a student can start from and that the converter accepts. A run in any parallel
layout can load the checkpoint of another layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_oprd.checkpoint.average import FOLDER as AVERAGE
from megatron_oprd.checkpoint.average import load_average
from megatron_oprd.checkpoint.format_checks import check_files, describe_damage
from megatron_oprd.checkpoint.megatron_format import load_model
from megatron_oprd.checkpoint.optimizer_state import load_optimizer
from megatron_oprd.checkpoint.pending_rollouts import read_pending
from megatron_oprd.checkpoint.state_file import REMOVE, StudentEntry, read_state_file
from megatron_oprd.config import teacher_section
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import explain_os_errors, prepare_partial
from megatron_oprd.training.map_optimizer import FILE as MAPS
from megatron_oprd.training.state import Identity, TrainState
from megatron_oprd.training.student import Student
from megatron_oprd.training.teacher_average import TeacherAverage
from megatron_oprd.types import UserError

MARK = "complete"  # the file that makes a checkpoint count
_NAME = re.compile(r"step_\d{7}")


@dataclass(frozen=True)
class CheckpointContent:
    """The parts of a run that a checkpoint stores or checks, on this rank."""

    student: Student
    spec: ModelSpec  # of the student
    topology: Topology  # of the student
    teachers: Mapping[str, Identity]  # by data source
    source: str  # folder whose tokenizer and config files go into `model/`
    student_path: str  # folder of the student's first weights
    student_hash: str = ""  # of the student's first weights; "": not stored and not checked


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def prepare_folders(target: Path, parts: Sequence[str] = ("model", "optimizer")) -> Path:
    """Make an empty folder for each of `parts` of a checkpoint beside `target`, and return the outer folder.

    One rank calls this. Raises UserError when the disk does not accept the folders.
    """
    if target.exists() and not (target / MARK).exists():
        with explain_os_errors(target):
            shutil.rmtree(target)  # renamed by a process that died before it added the mark
    partial = prepare_partial(target)
    with explain_os_errors(partial):
        for part in parts:
            (partial / part).mkdir()
    return partial


def prune_checkpoints(folder: Path, keep: int, best: str | None = None) -> None:
    """Remove all but the newest `keep` complete checkpoints, and the leftovers of killed processes.

    The checkpoint with the name `best` stays. One rank calls this. Raises UserError when the disk refuses to remove
    one.
    """
    complete = _complete(folder)
    kept = [*complete[-keep:], *(path for path in complete if path.name == best)]
    for path in folder.glob("step_*"):
        # Older checkpoints, and folders that a killed process left half-written or half-removed.
        if path not in kept and _NAME.fullmatch(path.name.removesuffix(".partial")):
            with explain_os_errors(path):
                (path / MARK).unlink(missing_ok=True)  # first, so that a half-removed folder is not complete
                shutil.rmtree(path)


def load_checkpoint(checkpoint: Path, content: CheckpointContent) -> TrainState:
    """Load weights, optimizer state and schedule position into the student, and return the position of the run.

    Collective over the world. Raises UserError for a damaged checkpoint, and for one made with other teachers, layer
    pairs or another bridge.
    """
    student, topology = content.student, content.topology
    saved = read_state_file(checkpoint)
    state = TrainState(saved.step, saved.prompts.state(), best=saved.best)
    state = dataclasses.replace(state, teacher_in_fp8=saved.teacher_in_fp8)
    if saved.layer_squares is not None:
        state = dataclasses.replace(state, squares=saved.layer_squares)
    if saved.pending is not None:
        with _explain_damage(checkpoint / "state.json"):
            state = dataclasses.replace(state, pending=read_pending(checkpoint, saved.pending, topology))
    _check_student(checkpoint, saved.student, content)
    _check_teachers(checkpoint, saved.teachers, content.teachers)
    _check_maps(checkpoint, student)

    def read_optimizer() -> None:
        with _explain_damage(checkpoint / "optimizer"):
            check_files(checkpoint / "optimizer")
            load_optimizer(student, topology, checkpoint / "optimizer")
        if student.map_optimizer is not None:
            with _explain_damage(checkpoint / MAPS):
                student.map_optimizer.load(checkpoint)

    on_every_rank(read_optimizer)
    # Weights come last: mcore initialises an optimizer in CPU memory by a step on random gradients.
    with _advise_to_remove():
        load_model(student.stage, checkpoint / "model", content.spec, topology)
    if student.average is not None:
        average = student.average
        on_every_rank(lambda: _read_average(checkpoint / AVERAGE, average, content))
    # The learning rate is a function of the step and the configuration alone.
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=state.step)
    return state


def _read_average(folder: Path, average: TeacherAverage, content: CheckpointContent) -> None:
    with _explain_damage(folder):
        check_files(folder)
        load_average(average, content.student.stage, content.topology, folder)


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / MARK).exists())


def _check_student(checkpoint: Path, saved: StudentEntry | None, content: CheckpointContent) -> None:
    """Raise UserError if the run of the checkpoint began with another student."""
    if saved and content.student_hash and saved.hash != content.student_hash:
        raise UserError(
            f"{checkpoint} was made with another student ({saved.path}, {saved.hash[:19]}) than "
            f"student.path={content.student_path} ({content.student_hash[:19]}); continue with that one or name a new "
            "train.run_dir"
        )


def _check_teachers(checkpoint: Path, saved: Mapping[str, Identity], current: Mapping[str, Identity]) -> None:
    """Raise UserError if the teachers of the checkpoint differ from those of the configuration."""
    if saved.keys() != current.keys():
        then, now = (", ".join(name or "a single teacher" for name in one) for one in (saved, current))
        raise UserError(
            f"{checkpoint} was made with other teachers ({then}) than the configuration names ({now}); continue with "
            "those or name a new train.run_dir"
        )
    for name, teacher in current.items():
        if saved[name].hash != teacher.hash:
            raise UserError(
                f"{checkpoint} was made with another teacher ({saved[name].path}, {saved[name].hash[:19]}) than "
                f"{teacher_section(name)}.path={teacher.path} ({teacher.hash[:19]}); continue with that one or "
                "name a new train.run_dir"
            )
        if saved[name].pairs != teacher.pairs:
            raise UserError(
                f"{checkpoint} was made with the layer pairs {_short(saved[name].pairs)}, the configuration asks for "
                f"{_short(teacher.pairs)}; continue with those or name a new train.run_dir"
            )
        if saved[name].bridge != teacher.bridge:
            raise UserError(
                f"{checkpoint} was made {_with(saved[name].bridge)}, loss.representation.bridge asks for a run "
                f"{_with(teacher.bridge)}; continue as it was or name a new train.run_dir"
            )
        if saved[name].base != teacher.base:
            raise UserError(
                f"{checkpoint} was made {_from_base(saved[name].base)}, {teacher_section(name)}.base asks for a run "
                f"{_from_base(teacher.base)}; continue as it was or name a new train.run_dir"
            )
        if saved[name].ema != teacher.ema:
            raise UserError(
                f"{checkpoint} was made with {_ema(saved[name].ema)}, {teacher_section(name)}.ema asks for "
                f"{_ema(teacher.ema)}; continue as it was or name a new train.run_dir"
            )


def _check_maps(checkpoint: Path, student: Student) -> None:
    """Raise UserError if only one of checkpoint and configuration trains maps."""
    trained = (checkpoint / MAPS).exists()
    if trained != (student.map_optimizer is not None):
        then, now = ("with", "has none") if trained else ("without", "has one")
        raise UserError(
            f"{checkpoint} was made {then} a trained map of hidden states, the configuration {now} "
            "(loss.representation.train_bridge or map.kind); continue as it was or name a new train.run_dir"
        )


def _short(pairs: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"{student}-{teacher}" for student, teacher in pairs[:4])
    return f"[{shown}{', ...' if len(pairs) > 4 else ''}]"


def _with(bridge: str | None) -> str:
    return f"with the bridge {bridge[:19]}" if bridge else "without a bridge"


def _from_base(base: str | None) -> str:
    if not base:
        return "without a base"
    extrapolate, digest, *space = base.split(" ")
    return " ".join([f"with the base {digest[:19]} and extrapolate {extrapolate}", *(f"({one})" for one in space)])


def _ema(rate: float | None) -> str:
    return "a frozen teacher" if rate is None else f"a teacher that follows the student with ema {rate:g}"


@contextlib.contextmanager
def _advise_to_remove() -> Iterator[None]:
    """Replace the advice of a UserError about files: nobody can copy a checkpoint that this run made."""
    try:
        yield
    except UserError as error:
        advised = UserError(error.message, REMOVE)
        advised.everywhere = error.everywhere
        raise advised from error.__cause__


@contextlib.contextmanager
def _explain_damage(part: Path) -> Iterator[None]:
    """Turn an exception of mcore or torch about a damaged part of a checkpoint into a UserError with its path."""
    try:
        with _advise_to_remove():
            yield
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is not an Exception
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        raise UserError(f"{part} cannot be read ({describe_damage(causes[0])}); {REMOVE}") from error
