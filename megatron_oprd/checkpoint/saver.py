"""The checkpoints of a run in time: at once, or while training goes on, one at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_oprd.checkpoint.megatron_format import describe_model, plan_model
from megatron_oprd.checkpoint.optimizer_state import plan_optimizer, state_is_a_copy
from megatron_oprd.checkpoint.training_state import MARK, prepare, prune
from megatron_oprd.parallel.collectives import min_over
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import commit_partial, discard_partial, explain_os_errors, write_json, write_text
from megatron_oprd.training.overlap import wait_for_gather
from megatron_oprd.training.state import Identity, TrainState
from megatron_oprd.training.student import Student
from megatron_oprd.types import ModelSpec


class Saving:
    """A checkpoint of all ranks on its way to the disk: begun, written by each rank alone, and finished by all."""

    def __init__(
        self,
        folder: Path,
        student: Student,
        spec: ModelSpec,
        topology: Topology,
        state: TrainState,
        teachers: Mapping[str, Identity],
        *,
        source: str,
        keep: int,
        asynchronous: bool = False,
    ) -> None:
        """Begin `folder/step_<step>`; when it counts, all but the newest `keep` go. Collective over the world.

        `source`: where the tokenizer and config files come from. With `asynchronous`, what is to be written is copied
        to CPU memory and a thread of this process writes it. Raises UserError on every rank for a disk that does not
        take it; earlier checkpoints are untouched, here and in all that follows.
        """
        self.topology, self.keep = topology, keep
        self.target = folder / f"step_{state.step:07d}"
        wait_for_gather(student.ddp)
        self.partial = on_rank_zero(lambda: prepare(self.target))
        with self._discarded_on_failure():
            model = plan_model(student.stage, self.partial / "model", topology)
            optimizer = plan_optimizer(student, topology, self.partial / "optimizer")
            self._parts = (model, optimizer)
            if student.map_optimizer is not None:
                student.map_optimizer.save(self.partial)
            on_rank_zero(lambda: self._describe(student, spec, state, teachers, source))
            if asynchronous:
                model.stage(copy=True)
                optimizer.stage(copy=not state_is_a_copy(student))
        self._thread = threading.Thread(target=self._write) if asynchronous else None
        if self._thread is not None:
            self._thread.start()

    def is_written(self) -> bool:
        """Whether every rank has written its files, or failed to. Collective over the world."""
        written = self._thread is None or not self._thread.is_alive()
        return min_over([written], dist.group.WORLD, self.topology.device) == [1.0]

    def finish(self) -> Path:
        """Write, or wait for what is being written, and make the checkpoint count. Collective over the world; raises
        UserError on every rank for a disk that did not take it on any."""
        if self._thread is None:
            self._write()
        else:
            self._thread.join()
        with self._discarded_on_failure():
            for part in self._parts:
                part.finish()
            on_rank_zero(self._commit)
        on_rank_zero(lambda: prune(self.target.parent, self.keep))
        return self.target

    def _write(self) -> None:
        for part in self._parts:
            part.write()

    @contextlib.contextmanager
    def _discarded_on_failure(self) -> Iterator[None]:
        try:
            with explain_os_errors(self.partial):
                yield
        except BaseException:
            if self.topology.rank == 0:
                discard_partial(self.target)
            raise

    def _describe(
        self,
        student: Student,
        spec: ModelSpec,
        state: TrainState,
        teachers: Mapping[str, Identity],
        source: str,
    ) -> None:
        describe_model(student.stage, self.partial / "model", spec, self.topology, source)
        named = {name: dataclasses.asdict(one) for name, one in teachers.items()}
        values = {"step": state.step, "prompts": state.prompts.to_dict(), "teachers": named}
        write_json(self.partial / "state.json", values)

    def _commit(self) -> None:
        commit_partial(self.target)
        write_text(self.target / MARK, "")


class Saver:
    """Saves checkpoints; with `asynchronous` (`checkpoint.asynchronous`) `save` returns when what is to be written has
    been copied, and `at_step` of a later step makes it count. Every rank does the same at the same time."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._in_flight: Saving | None = None

    def save(self, *args: Any, **kwargs: Any) -> Path:
        """Begin a checkpoint (the arguments of `Saving`), after the one before has been finished; where it is, or will
        be. Collective over the world; raises UserError on every rank for a disk that does not take this one or that
        one."""
        self.wait()
        self._in_flight = saving = Saving(*args, **kwargs, asynchronous=self.asynchronous)
        if not self.asynchronous:
            self.wait()
        return saving.target

    def at_step(self) -> None:
        """Finish what all ranks have written. Collective over the world, one number, while something is in flight;
        raises as `save` does."""
        if self._in_flight is not None and self._in_flight.is_written():
            self.wait()

    def wait(self) -> None:
        """Finish what is in flight. Collective over the world; raises as `save` does."""
        saving, self._in_flight = self._in_flight, None
        if saving is not None:
            saving.finish()
