"""Saving of training checkpoints during a run: at once, or by a thread while training continues.

`train` makes one `Saver`. The format of a checkpoint is described in `training_state.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_oprd.checkpoint.average import FOLDER as AVERAGE
from megatron_oprd.checkpoint.average import plan_average
from megatron_oprd.checkpoint.megatron_format import describe_model, plan_model
from megatron_oprd.checkpoint.optimizer_state import plan_optimizer, state_is_a_copy
from megatron_oprd.checkpoint.pending_rollouts import write_pending
from megatron_oprd.checkpoint.training_state import MARK, CheckpointContent, prepare_folders, prune_checkpoints
from megatron_oprd.config import CheckpointConfig
from megatron_oprd.parallel.collectives import max_over, min_over
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import commit_partial, discard_partial, explain_os_errors, write_json, write_text
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import Rollout


class Saver:
    """Saves checkpoints of a run, one at a time. Every rank calls the same methods at the same steps.

    With `asynchronous` (`checkpoint.asynchronous`) `save` returns when the values are copied to CPU memory. A later
    `after_step` or `wait` completes the checkpoint. Either way `save` waits for rollouts that are pending.
    """

    def __init__(self, folder: Path, content: CheckpointContent, config: CheckpointConfig) -> None:
        """Save into `folder` as the section `checkpoint` says."""
        self.folder, self.content, self.config = folder, content, config
        self._in_flight: Saving | None = None
        self._last_save = time.monotonic()  # when the last checkpoint began, or training

    def is_overdue(self) -> bool:
        """Return True if rank 0 began its last checkpoint `checkpoint.every_minutes` ago; never if that is 0.

        Communicates one number over the world, so that all ranks save after the same step.
        """
        if not self.config.every_minutes:
            return False
        topology = self.content.topology
        overdue = topology.rank == 0 and time.monotonic() - self._last_save >= 60 * self.config.every_minutes
        return max_over([overdue], dist.group.WORLD, topology.device) == [1.0]

    def save(self, state: TrainState) -> Path:
        """Begin a checkpoint after completing the one in flight, and return its path.

        Collective over the world. Raises UserError on every rank for a disk that does not accept one of the two.
        """
        self._last_save = time.monotonic()
        with progress.stage("checkpoint"):
            self._complete()
            self._in_flight = saving = Saving(
                self.folder, self.content, state, keep=self.config.keep, asynchronous=self.config.asynchronous
            )
            if not self.config.asynchronous:
                self._complete()
        return saving.target

    def after_step(self) -> None:
        """Complete the checkpoint in flight if all ranks have written it.

        Communicates one number over the world while a checkpoint is in flight. Raises UserError like `save`.
        """
        if self._in_flight is not None and self._in_flight.is_written():
            self._complete()

    def wait(self) -> None:
        """Complete the checkpoint in flight. Collective over the world. Raises UserError like `save`."""
        with progress.stage("checkpoint"):
            self._complete()

    def _complete(self) -> None:
        saving, self._in_flight = self._in_flight, None
        if saving is not None:
            saving.finish()


class Saving:
    """A checkpoint in flight: begun by all ranks, written by each rank alone, finished by all ranks."""

    def __init__(
        self, folder: Path, content: CheckpointContent, state: TrainState, *, keep: int, asynchronous: bool = False
    ) -> None:
        """Begin the checkpoint `folder/step_<step>`.

        With `asynchronous` the values are copied to CPU memory and a thread of this process writes them. Collective
        over the world. Raises UserError on every rank for a disk that does not accept the checkpoint. Earlier
        checkpoints stay untouched by an error, here and in `finish`.
        """
        self.topology, self.keep = content.topology, keep
        self.best = state.best.name if state.best is not None else None
        self.target = folder / f"step_{state.step:07d}"
        rollouts = _pending_rollouts(state, self.topology)
        content.student.stage.wait_for_parameters()
        folders = ["model", "optimizer"] + ([AVERAGE] if content.student.average is not None else [])
        self.partial = on_rank_zero(lambda: prepare_folders(self.target, folders))
        with self._discarded_on_failure():
            student = content.student
            model = plan_model(student.stage, self.partial / "model", self.topology)
            optimizer = plan_optimizer(student, self.topology, self.partial / "optimizer")
            self._writes = [model, optimizer]
            if student.average is not None:
                average = plan_average(student.average, student.stage, self.topology, self.partial / AVERAGE)
                self._writes.append(average)
            if student.map_optimizer is not None:
                student.map_optimizer.save(self.partial)
            on_rank_zero(lambda: self._describe(content, state, rollouts))
            if asynchronous:
                model.snapshot(copy=True)
                optimizer.snapshot(copy=not state_is_a_copy(student))
                if student.average is not None:
                    average.snapshot(copy=False)
        self._thread = threading.Thread(target=self._write) if asynchronous else None
        if self._thread is not None:
            self._thread.start()

    def is_written(self) -> bool:
        """Return True if every rank has written its files or failed to. Collective over the world."""
        written = self._thread is None or not self._thread.is_alive()
        return min_over([written], dist.group.WORLD, self.topology.device) == [1.0]

    def finish(self) -> Path:
        """Write the files or wait for the thread, mark the checkpoint complete, and remove all but the newest `keep`
        and the best one.

        Collective over the world. Raises UserError on every rank for an error of any rank's disk.
        """
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        with self._discarded_on_failure():
            for write in self._writes:
                write.finish()
            on_rank_zero(self._commit)
        on_rank_zero(lambda: prune_checkpoints(self.target.parent, self.keep, self.best))
        return self.target

    def _write(self) -> None:
        for write in self._writes:
            write.write()

    @contextlib.contextmanager
    def _discarded_on_failure(self) -> Iterator[None]:
        try:
            with explain_os_errors(self.partial):
                yield
        except BaseException:
            if self.topology.rank == 0:
                discard_partial(self.target)
            raise

    def _describe(self, content: CheckpointContent, state: TrainState, rollouts: Sequence[Rollout]) -> None:
        describe_model(content.student.stage, self.partial / "model", content.spec, self.topology, content.source)
        teachers = {name: identity.to_dict() for name, identity in content.teachers.items()}
        values = {"step": state.step, "prompts": state.prompts.to_dict(), "teachers": teachers}
        if content.student_hash:
            values["student"] = {"path": content.student_path, "hash": content.student_hash}
        if state.best is not None:
            values["best"] = dataclasses.asdict(state.best)
        if state.squares.steps:
            values["layer_squares"] = state.squares.to_dict()
        if state.teacher_in_fp8 is not None:
            values["teacher_in_fp8"] = state.teacher_in_fp8
        if state.pending is not None:
            values["pending"] = write_pending(self.partial, state.pending, rollouts).to_dict()
        write_json(self.partial / "state.json", values)

    def _commit(self) -> None:
        commit_partial(self.target)
        write_text(self.target / MARK, "")


def _pending_rollouts(state: TrainState, topology: Topology) -> list[Rollout]:
    """Wait for the pending rollouts of all replicas and return them; an empty list if none are pending."""
    if state.pending is None:
        return []
    with progress.stage("rollout"):
        return share_rollouts(state.pending.rollouts, topology)
