"""The memory of a run, rank by rank, before anything of its size exists: an update is traced in processes without GPU.

`python -m megatron_oprd.planning.peak_memory` is such a process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_oprd.config import Config
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.planning.memory_formulas import most_selected
from megatron_oprd.planning.update_trace import Footprint, trace_update
from megatron_oprd.types import ModelSpec, Rollout


class NotTraced(Exception):
    """An update that cannot be traced, and why."""


def predict_peaks(
    config: Config,
    student: ModelSpec,
    planned: Sequence[PlannedTeacher],
    lengths: Lengths,
    *,
    world: int,
    bridge_rank: int | None = None,
) -> dict[range, Footprint]:
    """The footprint of an update on the fullest micro-batch that there can be, for all ranks that hold alike parts of
    the models: those of one pipeline rank of student and teachers. `bridge_rank`: r of a bridge between them.

    Takes seconds for each, in processes of its own. Raises NotTraced.
    """
    kinds = alike(
        world, [layout.pipeline for layout in (config.parallel, *(t.layout or config.parallel for t in planned))]
    )
    workers = min(len(kinds), os.cpu_count() or 1)

    def trace(some: Sequence[range]) -> list[Footprint]:
        ranks = [kind.start for kind in some]
        return _in_a_process(config, student, list(planned), lengths, ranks, world, bridge_rank)

    with ThreadPoolExecutor(workers) as pool:
        parts = list(pool.map(trace, [kinds[number::workers] for number in range(workers)]))
    return {kind: parts[number % workers][number // workers] for number, kind in enumerate(kinds)}


def alike(world: int, pipelines: Sequence[int]) -> list[range]:
    """The ranks with the same place in pipelines of these sizes. (Megatron counts pipeline ranks slowest.)"""
    starts = sorted({stage * world // size for size in pipelines for stage in range(size)})
    return [range(start, end) for start, end in zip(starts, [*starts[1:], world], strict=True)]


def fullest_micro_batch(config: Config, lengths: Lengths, *, world: int) -> tuple[list[Rollout], int]:
    """Rollouts that fill a micro-batch, and how many such micro-batches a replica has in a step: full-length ones for a
    pipeline, which keeps several micro-batches; else as many as bring the most tokens for the loss to read."""
    parallel = config.parallel
    replicas = world // (parallel.tensor * parallel.pipeline * parallel.context)
    most = math.ceil(config.rollout.prompts_per_step * config.rollout.samples_per_prompt / replicas)
    longest = min(lengths.sequence, config.batch.max_tokens_per_micro_batch)
    tokens = min(config.batch.max_tokens_per_micro_batch, most * longest) if config.batch.packing else longest
    count = math.ceil(tokens / longest)
    if config.batch.packing and parallel.pipeline == 1:
        count = max(count, min(most, tokens // (most_selected(config.loss) + 1)))
    sizes = [tokens // count + (number < tokens % count) for number in range(count)]
    return [_rollout(size, lengths.response) for size in sizes], math.ceil(most / count)


def _rollout(tokens: int, longest_response: int) -> Rollout:
    response = max(min(tokens - 1, longest_response), 1)
    return Rollout((0,) * (tokens - response), (0,) * response, (1,) * response, "length")


def _in_a_process(
    config: Config,
    student: ModelSpec,
    planned: list[PlannedTeacher],
    lengths: Lengths,
    ranks: list[int],
    world: int,
    bridge_rank: int | None,
) -> list[Footprint]:
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_oprd.planning.peak_memory"],
        input=pickle.dumps((config, student, planned, lengths, ranks, world, bridge_rank)),
        env=environment,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise NotTraced(said[-1] if said else f"exit code {done.returncode}")
    return [Footprint(**parts) for parts in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """Trace what stands, pickled, on stdin; the last line on stdout are the footprints as JSON."""
    config, student, planned, lengths, ranks, world, bridge_rank = pickle.load(sys.stdin.buffer)
    rollouts, count = fullest_micro_batch(config, lengths, world=world)
    footprints = [
        trace_update(
            config,
            student,
            planned,
            rollouts,
            rank=rank,
            world=world,
            micro_batches=count,
            bridge_rank=bridge_rank,
        )
        for rank in ranks
    ]
    print(json.dumps([dataclasses.asdict(footprint) for footprint in footprints]))


if __name__ == "__main__":
    main()
