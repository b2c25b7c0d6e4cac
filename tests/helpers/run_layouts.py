"""Run cases of the matrix on real ranks and compare each of them with the update of the reference."""

from __future__ import annotations

import datetime
import functools
import gc
import itertools
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_oprd.launch.assemble import Run
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.reshard import Shard, minimum_rows
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.replayed_run import some_rollouts
from megatron_oprd.testing.update import Difference, Update, difference, measure_update, undo_step
from megatron_oprd.train import one_step
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.types import FlowKey, Rollout
from tests.helpers.bridges import save_random_bridge
from tests.helpers.layouts import ROLLOUTS, Case
from tests.helpers.training import make_run, small_buckets

VOCABULARY = 131  # of `random_hf_model`
BRIDGE_RANK = 6


@dataclass(frozen=True)
class Result:
    """The results of the ranks of a case."""

    update: Update
    fewest_bytes: int  # the smallest number of bytes of teacher states that must move between ranks
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A case, its result, and the comparison with the reference."""

    case: Case
    result: Result | None
    difference: Difference | None
    failure: str | None  # None if the update agrees with the reference
    details: str = ""  # the traceback if the case raised


class References:
    """The models of the cases in a folder, and the update of the reference for each case. Both are cached."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = functools.cache(self._model)
        self._update = functools.cache(self._compute)

        self.bridge = functools.cache(self._bridge)

    def models(self, case: Case) -> tuple[Path, Path]:
        """Return the folders of student and teacher."""
        student, teacher = case.layers
        return (
            self.model(case.family, student, case.tied, 0, 64),
            self.model(case.family, teacher, case.tied, 1, case.teacher_width),
        )

    def overrides(self, case: Case) -> tuple[str, ...]:
        """Return the settings of the case, with the bridge between its models and the base of its teacher, if any."""
        bridged = case.config.loss.representation.bridge is not None
        return (
            *case.overrides,
            *([f"loss.representation.bridge={self.bridge(*self.models(case))}"] if bridged else []),
            *([f"teacher.base.path={self._base(case)}"] if case.config.named_teachers[""].base else []),
        )

    def _base(self, case: Case) -> Path:
        return self.model(case.family, case.layers[1], case.tied, 2, case.teacher_width)

    def update(self, case: Case) -> Update:
        exact = [one for one in self.overrides(case) if not one.startswith("loss.output.chunk_tokens")]
        loss = tuple(
            override
            for override in exact
            if override.startswith(("loss.", "rollout.temperature", "teacher.base", "teacher.ema"))
        )
        return self._update(*self.models(case), case.rollouts, loss)

    def _model(self, family: str, layers: int, tied: bool, seed: int, width: int) -> Path:
        sizes = {"num_hidden_layers": layers, "tie_word_embeddings": tied, "num_key_value_heads": 4}
        name = f"{family}-{layers}-{tied}-{seed}-{width}"
        return save(random_hf_model(family, seed, hidden_size=width, **sizes), self.folder / name)

    def _bridge(self, student: Path, teacher: Path) -> Path:
        folder = self.folder / f"bridge-{student.name}-{teacher.name}"
        return save_random_bridge(folder, student, teacher, rank=BRIDGE_RANK)

    def _compute(self, student: Path, teacher: Path, rollouts: str, loss: tuple[str, ...]) -> Update:
        return reference_update(student, teacher, *loss, rollouts=rollouts_of(rollouts))


def rollouts_of(name: str) -> list[Rollout]:
    return some_rollouts(VOCABULARY, masks=ROLLOUTS[name])


Defect = Callable[[], AbstractContextManager[None]]  # entered on every rank around a case; see tests/helpers/defects.py


def run_cases(
    cases: Iterable[Case], references: References, folder: Path, defect: Defect = nullcontext
) -> Iterator[Outcome]:
    """Run every case on real ranks and compare it with its reference.

    Cases with equally many ranks run one after the other on the same processes, which start anew after an error.
    """
    in_order = sorted(cases, key=lambda case: case.world)
    for world, group in itertools.groupby(in_order, key=lambda case: case.world):
        rest = list(group)
        while rest:
            attempt = folder / f"{world}-{len(rest)}-{time.monotonic_ns()}"
            attempt.mkdir(parents=True)
            jobs = [(case, *references.models(case), references.overrides(case)) for case in rest]
            message = ""
            try:
                run_distributed(world, _run_jobs, jobs, attempt, defect, timeout_seconds=100 + 4 * world * len(jobs))
            except AssertionError as error:
                message = str(error)
            done = len(list(attempt.glob("*.done")))
            for number, case in enumerate(rest[:done]):
                yield _compare(case, pickle.loads((attempt / f"{number}.done").read_bytes()), references.update(case))
            if done < len(rest):
                last_line = message.strip().splitlines()[-1] if message else "no result"
                yield Outcome(rest[done], None, None, last_line, message)
            rest = rest[done + 1 :]


def _compare(case: Case, result: Result, expected: Update) -> Outcome:
    found = difference(result.update, expected)
    failure = found.explain()
    moved = result.update.metrics["teacher/moved_bytes"]
    if failure is None and moved != result.fewest_bytes:
        failure = f"{moved:.0f} bytes of teacher states moved, {result.fewest_bytes} would do"
    return Outcome(case, result, found, failure)


Job = tuple[Case, Path, Path, tuple[str, ...]]  # a case, its models and its settings


def _run_jobs(rank: int, jobs: Sequence[Job], folder: Path, defect: Defect) -> None:
    for number, (case, student, teacher, overrides) in enumerate(jobs):
        _new_world(rank, case.world, folder / f"{number}.store")
        with defect():
            result = _run_job(case, student, teacher, overrides)
        if rank == 0:
            unfinished = folder / f"{number}.new"
            unfinished.write_bytes(pickle.dumps(result))
            os.replace(unfinished, folder / f"{number}.done")
        dist.barrier()


def _run_job(case: Case, student: Path, teacher: Path, overrides: tuple[str, ...]) -> Result:
    begin = time.perf_counter()
    overlaps = case.config.parallel.overlap_grad_reduce
    with small_buckets() if overlaps else nullcontext():
        run = make_run(student, teacher, *overrides, rollouts=rollouts_of(case.rollouts))
    fewest = _fewest_bytes(run)
    if run.student.average is not None:
        run.student.average.update()
    if overlaps:
        undo_step(run, one_step)  # Megatron-Core overlaps from the second step on, when it knows how full a bucket is
    return Result(measure_update(run, one_step), fewest, time.perf_counter() - begin)


def _new_world(rank: int, world: int, store: Path) -> None:
    """Replace the process groups of the last case by a new world. Megatron makes dozens, each with threads."""
    parallel_state.destroy_model_parallel()
    gc.collect()
    dist.destroy_process_group()
    timeout = datetime.timedelta(seconds=100)
    store_of_case = dist.FileStore(str(store), world)
    dist.init_process_group("gloo", store=store_of_case, rank=rank, world_size=world, timeout=timeout)


def _fewest_bytes(run: Run) -> int:
    """Return the bytes of teacher states that a rank needs and that another rank computes.

    Computed from the micro-batches of both layouts. Collective over the world.
    """
    plan, (teacher,) = run.inputs.setup.layer_plan.for_loss(run.inputs.config.loss.at(0)), run.teachers
    readers = plan.readers(run.topology.stages)
    (planned,) = run.inputs.setup.teachers.values()
    total = 0
    kinds = {"representation": int, "output": str} | ({"flow": FlowKey} if plan.flow else {})
    for term, kind in kinds.items():
        born, read = (
            tuple(sorted(layer for layer in set(layers) if isinstance(layer, kind)))
            for layers in (plan.teacher_layers(teacher.topology.stages), readers.values())
        )
        source = Shard(born, _selected_rows(run, teacher.topology, term))
        wanted = Shard(read, _selected_rows(run, run.topology, term))
        shards = gather_objects((source, wanted), dist.group.WORLD)
        rows = minimum_rows([of_rank for of_rank, _ in shards], [of_rank for _, of_rank in shards])
        width = planned.spec.hidden_size
        if term == "representation" and run.inputs.bridge:
            width = run.inputs.bridge.rank
        if term == "output" and planned.config.extrapolates_output:
            width *= 2  # the final states of the base, which has the teacher's width
        total += rows * width
    return total * torch.float32.itemsize


def _selected_rows(run: Run, topology: Topology, term: str) -> torch.Tensor:
    config, rollouts = run.inputs.config, run.inputs.replayed
    teachers = (0,) * len(rollouts)
    global_batch = GlobalBatch(tuple(rollouts), teachers, config.loss.at(0), config.batch, run.inputs.setup.student)
    return torch.cat([getattr(batch.host, term).token_numbers for batch in global_batch.micro_batches(topology)])
