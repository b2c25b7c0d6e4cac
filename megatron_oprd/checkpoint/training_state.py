"""Training checkpoints: the student as a Megatron checkpoint, its optimizer, and where the run stands.

    checkpoints/step_0000050/   model/ optimizer/ state.json complete

A checkpoint is written under another name, forced to the disk, renamed and then marked `complete`: a process killed at
any moment leaves the last complete one. `model/` is a Megatron checkpoint of its own: a student can start from it and
the converter reads it. Any layout reads what another wrote.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from megatron_oprd.checkpoint.megatron_format import check_files, describe_damage, load_model
from megatron_oprd.checkpoint.optimizer_state import load_optimizer
from megatron_oprd.config import teacher_section
from megatron_oprd.data.prompts import PromptState
from megatron_oprd.hf.config import read_json
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import explain_os_errors, prepare_partial
from megatron_oprd.training.map_optimizer import FILE as MAPS
from megatron_oprd.training.state import Identity, TrainState
from megatron_oprd.training.student import Student
from megatron_oprd.types import ModelSpec, UserError

MARK = "complete"
_NAME = re.compile(r"step_\d{7}")


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def prepare(target: Path) -> Path:
    """Fresh folders to write a checkpoint into, beside `target`. One rank calls it; raises UserError for a disk that
    does not take them."""
    if target.exists() and not (target / MARK).exists():
        with explain_os_errors(target):
            shutil.rmtree(target)  # renamed, but the process died before marking it
    partial = prepare_partial(target)
    with explain_os_errors(partial):
        for part in ("model", "optimizer"):
            (partial / part).mkdir()
    return partial


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints. One rank calls it; raises UserError for a disk that does
    not let go of one."""
    kept = _complete(folder)[-keep:]
    for path in folder.glob("step_*"):
        # Older, or left half-written or half-removed by a process that was killed.
        if path not in kept and _NAME.fullmatch(path.name.removesuffix(".partial")):
            with explain_os_errors(path):
                (path / MARK).unlink(missing_ok=True)  # first: a half-removed folder must not look complete
                shutil.rmtree(path)


def load(
    checkpoint: Path, student: Student, spec: ModelSpec, topology: Topology, teachers: Mapping[str, Identity]
) -> TrainState:
    """Put student, optimizer and schedule where the checkpoint left them. Collective over the world.

    Raises UserError for a checkpoint made with another teacher, layer map or bridge, or one that is damaged.
    """
    values = read_json(checkpoint / "state.json")
    with _explain_damage(checkpoint / "state.json"):
        state = TrainState(int(values["step"]), PromptState.from_dict(values["prompts"]))
        saved = {
            str(name): Identity(
                str(one["path"]), str(one["hash"]), tuple((s, t) for s, t in one["pairs"]), one.get("bridge")
            )
            for name, one in values["teachers"].items()
        }
    _check_teachers(checkpoint, saved, teachers)
    _check_maps(checkpoint, student)

    def read_optimizer() -> None:
        with _explain_damage(checkpoint / "optimizer"):
            check_files(checkpoint / "optimizer")
            load_optimizer(student, topology, checkpoint / "optimizer")
        if student.map_optimizer is not None:
            with _explain_damage(checkpoint / MAPS):
                student.map_optimizer.load(checkpoint)

    on_every_rank(read_optimizer)
    # The weights last: mcore makes the state of an optimizer in CPU memory with a step on random gradients.
    load_model(student.stage, checkpoint / "model", spec, topology)
    # The rate is a function of the step and the configuration alone.
    student.scheduler.num_steps = 0
    student.scheduler.step(increment=state.step)
    return state


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / MARK).exists())


def _check_teachers(checkpoint: Path, saved: Mapping[str, Identity], asked: Mapping[str, Identity]) -> None:
    if saved.keys() != asked.keys():
        then, now = (", ".join(name or "a single teacher" for name in one) for one in (saved, asked))
        raise UserError(
            f"{checkpoint} was made with other teachers ({then}) than the configuration names ({now}); go on with "
            "those or name a new train.run_dir"
        )
    for name, one in asked.items():
        if saved[name].hash != one.hash:
            raise UserError(
                f"{checkpoint} was made with another teacher ({saved[name].path}, {saved[name].hash[:19]}) than "
                f"{teacher_section(name)}.path={one.path} ({one.hash[:19]}); go on with that one or name a new "
                "train.run_dir"
            )
        if saved[name].pairs != one.pairs:
            raise UserError(
                f"{checkpoint} was made with the layer pairs {_short(saved[name].pairs)}, the configuration asks for "
                f"{_short(one.pairs)}; go on with those or name a new train.run_dir"
            )
        if saved[name].bridge != one.bridge:
            raise UserError(
                f"{checkpoint} was made {_with(saved[name].bridge)}, loss.representation.bridge asks for a run "
                f"{_with(one.bridge)}; go on as it was or name a new train.run_dir"
            )


def _check_maps(checkpoint: Path, student: Student) -> None:
    trained = (checkpoint / MAPS).exists()
    if trained != (student.map_optimizer is not None):
        then, now = (json.dumps(one) for one in (trained, not trained))
        raise UserError(
            f"{checkpoint} was made with loss.representation.train_bridge={then}, the configuration has {now}; go on "
            "as it was or name a new train.run_dir"
        )


def _short(pairs: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"{student}-{teacher}" for student, teacher in pairs[:4])
    return f"[{shown}{', ...' if len(pairs) > 4 else ''}]"


def _with(bridge: str | None) -> str:
    return f"with the bridge {bridge[:19]}" if bridge else "without a bridge"


@contextlib.contextmanager
def _explain_damage(part: Path) -> Iterator[None]:
    """Turn what mcore and torch raise for a damaged part of a checkpoint into a UserError that names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; remove this checkpoint to go on from the one before") from None
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        raise UserError(
            f"{part} cannot be read ({describe_damage(causes[0])}); remove this checkpoint to go on from the one before"
        ) from error
