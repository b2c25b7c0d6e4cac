"""Peak memory of a run, rank by rank, before anything of its size exists.

Updates are traced on a CPU, in worker processes. `python -m megatron_oprd.planning.peak_memory` is the worker on a
machine with a CUDA device; elsewhere a worker is forked, which saves the seconds of the imports.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_oprd.planning.memory_formulas import most_selected_tokens
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.update_trace import Footprint, trace_update
from megatron_oprd.types import Rollout

Job = TypeVar("Job")
Result = TypeVar("Result")


class NotTraced(Exception):
    """The reason why an update could not be traced."""


def predict_peaks(run: PlannedRun) -> dict[range, Footprint]:
    """Return the footprint of an update on the fullest possible micro-batch, for each group of ranks.

    Ranks with the same pipeline rank in the student and in every teacher form a group: they have the same footprint.
    Each group takes seconds in a worker process. Raises NotTraced if a worker fails.
    """
    groups = rank_groups(run)
    workers = min(len(groups), os.cpu_count() or 1)
    shares = [[group.start for group in groups[number::workers]] for number in range(workers)]
    parts = in_workers(_trace, [(run, share) for share in shares])
    return {group: parts[number % workers][number // workers] for number, group in enumerate(groups)}


def in_workers(task: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """Return `task(job)` for each job, computed in worker processes that have no CUDA device and no process group.

    `task`, a function of a module, and its jobs and results are pickled. Raises NotTraced if a worker fails.
    """
    workers = min(len(jobs), os.cpu_count() or 1)
    try:
        if torch.cuda.is_available() or dist.is_initialized():  # a fork would still see them
            with ThreadPoolExecutor(workers) as threads:
                return list(threads.map(partial(_in_new_process, task), jobs))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns of the fork
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as processes:
            return list(processes.map(task, jobs))
    except NotTraced:
        raise
    except Exception as error:
        raise NotTraced(f"{type(error).__name__}: {error}") from error


def rank_groups(run: PlannedRun) -> list[range]:
    """Return the groups of ranks that have the same pipeline rank in the student and in every teacher."""
    layouts = [run.config.parallel, *(teacher.layout or run.config.parallel for teacher in run.setup.teachers.values())]
    return groups_of_ranks(run.setup.world_size, [layout.pipeline for layout in layouts])


def groups_of_ranks(world_size: int, pipeline_sizes: Sequence[int]) -> list[range]:
    """Return the groups of ranks that have the same pipeline rank in pipelines of all given sizes.

    Megatron-Core counts pipeline ranks slowest, so a group is a range.
    """
    starts = sorted({stage * world_size // size for size in pipeline_sizes for stage in range(size)})
    return [range(start, end) for start, end in zip(starts, [*starts[1:], world_size], strict=True)]


def fullest_micro_batch(run: PlannedRun) -> tuple[list[Rollout], int]:
    """Return rollouts that fill one micro-batch, and the number of such micro-batches that a replica has in a step.

    A pipeline has several micro-batches in memory: it gets the longest rollouts. Without a pipeline, the micro-batch
    has as many rollouts as give the loss the most selected tokens.
    """
    config, parallel, lengths = run.config, run.config.parallel, run.lengths
    replicas = run.setup.world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    most = math.ceil(run.rollouts_per_step / replicas)
    longest = min(lengths.sequence, config.batch.max_tokens_per_micro_batch)
    tokens = min(config.batch.max_tokens_per_micro_batch, most * longest) if config.batch.packing else longest
    count = math.ceil(tokens / longest)
    if config.batch.packing and parallel.pipeline == 1:
        count = max(count, min(most, tokens // (most_selected_tokens(config.loss) + 1)))
    sizes = [tokens // count + (number < tokens % count) for number in range(count)]
    return [_rollout(size, lengths.response) for size in sizes], math.ceil(most / count)


def _rollout(tokens: int, longest_response: int) -> Rollout:
    response = max(min(tokens - 1, longest_response), 1)
    return Rollout((0,) * (tokens - response), (0,) * response, (1,) * response, "length")


def _in_new_process(task: Callable[[Job], Result], job: Job) -> Result:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_oprd.planning.peak_memory"],
        input=pickle.dumps((task, job)),
        env=environment,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise NotTraced(lines[-1] if lines else f"exit code {done.returncode}")
    result: Result = pickle.loads(bytes.fromhex(done.stdout.splitlines()[-1].decode()))
    return result


def _trace(job: tuple[PlannedRun, list[int]]) -> list[Footprint]:
    run, ranks = job
    torch.set_num_threads(1)
    rollouts, count = fullest_micro_batch(run)
    return [trace_update(run, rollouts, rank=rank, micro_batches=count) for rank in ranks]


def main() -> None:
    """Do the task that is pickled on stdin with its job. The last line on stdout is the pickled result in hex."""
    task, job = pickle.load(sys.stdin.buffer)
    print(pickle.dumps(task(job)).hex())


if __name__ == "__main__":
    main()
