"""Compare rollout engines: the embedded engine, a vLLM server and transformers' `generate`, with the same weights.

    python benchmarks/rollout.py [--batch 1 16 64 --repeats 5 --docs docs]
    python benchmarks/rollout.py --preset h100 --docs docs    # a 1.5B shape in bf16 on one GPU, within 8 minutes
    python benchmarks/rollout.py --preset h100 --rehearse     # the same cases, tiny, on a CPU

The engines run in turn in one process with the same number of threads, once to warm up and then `--repeats` times. All
models have random weights; nothing is downloaded. Workloads, each with a fixed number of rows at a time:

- equal: all prompts have one length and all responses another, so no row waits.
- mixed: more prompts than rows, prompts and responses of different lengths. transformers pads prompts on the left and
  runs each batch until its longest response is complete; an engine gives the slot of a finished row to the next prompt.

A line is printed as soon as an engine is measured, the whole record as JSON at the end. `--docs` adds the record to
rollouts.json and to the last section of rollouts.md in that folder. What goes wrong is noted in the row of the engine,
the others are measured, and the exit code is 1; running out of memory is a result.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import facts, name_of
from benchmarks.pages import with_section
from benchmarks.rollout_calls import calls_per_decode_step
from benchmarks.rollout_engines import Generate, Side, embedded_side, transformers_side
from benchmarks.rollout_page import HEADING, line, runs
from benchmarks.rollout_training import time_training
from benchmarks.rollout_workloads import (
    H100_SHAPE,
    H100_WORKLOADS,
    REHEARSAL_SHAPE,
    REHEARSAL_WORKLOADS,
    Shape,
    Workload,
    small_workloads,
)
from benchmarks.updates import peak_of
from megatron_oprd.config import ParallelConfig
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.environment import find_machine
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.types import UserError

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "h100"), default="cpu", help="model shape and workloads")
    parser.add_argument("--rehearse", action="store_true", help="with --preset h100: tiny sizes, on a CPU too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="preset cpu: rows at a time")
    parser.add_argument("--workload", nargs="+", default=["equal", "mixed"], choices=["equal", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="preset cpu")
    parser.add_argument("--hidden", type=int, default=256, help="preset cpu")
    parser.add_argument("--vocabulary", type=int, default=4096, help="preset cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: for a machine shared with others")
    parser.add_argument("--train-steps", type=int, default=0, help="also time so many training steps, 3 at least")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no further workload after this time")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument(
        "--docs", type=Path, help="folder of rollouts.md and rollouts.json, to which the record is added"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = choose_device("auto")
    if options.preset == "h100" and device.type != "cuda" and not options.rehearse:
        raise UserError("--preset h100 needs a CUDA device, and there is none; --rehearse runs it at tiny sizes")
    shape, workloads = sizes_of(options)
    record: dict[str, Any] = {"date": f"{datetime.date.today()}", "preset": options.preset, "device": hardware(device)}
    record |= {"versions": facts(find_machine()), "shape": vars(shape), "repeats": options.repeats}
    record |= {"threads": options.threads, "clock": options.clock, "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        sides = build_sides(shape, Path(folder), device)
        measurement = Measurement(device, CLOCKS[options.clock], options.repeats)
        begin = time.monotonic()
        for workload in workloads:
            if time.monotonic() - begin > 60 * options.minutes:
                record["rows"] += [measurement.empty_row(side, workload, "not begun: no time left") for side in sides]
                continue
            record["rows"] += measurement.run(sides, workload, shape.vocabulary)
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")
        if options.train_steps:
            engines = {"embedded": ()}
            record["training"] = time_training(
                shape, Path(folder) / "training", engines, options.train_steps, options.threads
            )
    if options.docs:
        keep(record, options.docs)
    print(json.dumps(record), flush=True)
    rows = [*record["rows"], *record.get("training", ())]
    return int(any(row["note"].startswith("failed") for row in rows))


def sizes_of(options: argparse.Namespace) -> tuple[Shape, list[Workload]]:
    """Return the model shape and the workloads of the options."""
    if options.preset == "h100":
        return (REHEARSAL_SHAPE, REHEARSAL_WORKLOADS) if options.rehearse else (H100_SHAPE, H100_WORKLOADS)
    hidden = options.hidden
    shape = Shape("Qwen3", options.layers, hidden, 3 * hidden, 8, 4, options.vocabulary, tied=True, deviation=0.1)
    return shape, small_workloads(options.workload, options.batch)


def build_sides(shape: Shape, folder: Path, device: torch.device) -> list[Side]:
    """Return the engines, all with the weights of one random model; `folder` receives its Hugging Face files."""
    hf = shape.build(device)
    hf.save_pretrained(folder)
    start_process(device)
    topology = build_topology(ParallelConfig(), device, seed=0)
    machine = find_machine()
    sides = [embedded_side(folder, topology, shape.dtype, machine), transformers_side(hf)]
    if device.type == "cuda" and machine.transformer_engine:
        sides.append(embedded_side(folder, topology, shape.dtype, machine, attention="te"))
    return sides


@dataclass
class Measurement:
    """Runs the sides in turn on a workload and returns a row of figures for each.

    A row has lists with a value per repeat: `seconds` for all responses; with equal lengths `prefill_seconds`, for one
    token of each row; `sync_seconds`, for a transfer of the weights. `first_seconds` is the run that warms up.
    """

    device: torch.device
    clock: Callable[[], float]
    repeats: int

    def run(self, sides: Sequence[Side], workload: Workload, vocabulary: int) -> list[dict[str, Any]]:
        """Return the row of each side on a workload, and print it."""
        prompts, limits = workload.draw(vocabulary)
        gc.collect()
        runs = {side.name: _SideRun(side, workload, self.empty_row(side, workload, "")) for side in sides}
        for repeat in range(self.repeats + 1):
            for one in runs.values():
                one.attempt(lambda one=one, first=not repeat: self._time(one, prompts, limits, first))
        for one in runs.values():
            one.attempt(lambda one=one: self._peak(one, prompts, limits))
            if workload.equal:
                one.attempt(lambda one=one: self._count_calls(one, prompts))
        reference = next(iter(runs.values())).answers
        for one in runs.values():
            if one.answers and reference and not workload.temperature:
                equal = sum(a == b for a, b in zip(one.answers, reference, strict=True))
                one.row["same_answers"] = equal / len(reference)
            print(line(one.row), flush=True)
        return [one.row for one in runs.values()]

    def empty_row(self, side: Side, workload: Workload, note: str) -> dict[str, Any]:
        """Return a row without figures; `note` says why there are none."""
        row: dict[str, Any] = {"engine": side.name, "workload": workload.name, "rows": workload.rows}
        row |= {"prompts": workload.prompts, "prompt_tokens": workload.prompt_tokens}
        row |= {"new_tokens": workload.new_tokens, "temperature": workload.temperature, "tokens": None}
        row |= {"first_seconds": None, "seconds": [], "prefill_seconds": [], "sync_seconds": []}
        return row | {"peak_bytes": None, "server_bytes": None, "same_answers": None, "calls": {}, "note": note}

    def _time(self, one: _SideRun, prompts: Sequence[Any], limits: Sequence[int], first: bool) -> None:
        """Time one run of a side, after a transfer of the weights (which also empties a server's prefix cache)."""
        row = one.row
        sync = self._seconds(one.side.sync) if one.side.sync else 0.0
        if one.workload.equal:
            prefill = self._seconds(lambda: one.generate(prompts, [1] * len(limits)))
            if one.side.sync:
                one.side.sync()

        def generate() -> None:
            one.answers = one.generate(prompts, limits)

        seconds = self._seconds(generate)
        row["tokens"] = sum(map(len, one.answers))
        if first:
            row["first_seconds"] = seconds
            return
        row["seconds"].append(seconds)
        row["sync_seconds"].append(sync)
        if one.workload.equal:
            row["prefill_seconds"].append(prefill)

    def _seconds(self, run: Callable[[], object]) -> float:
        begin = self.clock()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - begin

    def _peak(self, one: _SideRun, prompts: Sequence[Any], limits: Sequence[int]) -> None:
        if one.side.server_bytes is not None:
            one.row["server_bytes"] = one.side.server_bytes()
        else:
            if self.device.type == "cpu":
                ctypes.CDLL(None).malloc_trim(0)  # memory of earlier runs would hide that of this one
            one.row["peak_bytes"] = peak_of(lambda: one.generate(prompts, limits), self.device)

    def _count_calls(self, one: _SideRun, prompts: Sequence[Any]) -> None:
        if one.side.server_bytes is None:
            one.row["calls"] = calls_per_decode_step(one.generate, prompts, self.device)


@dataclass
class _SideRun:
    """A side at work on a workload. After a failure its row has a note, and nothing of it runs again."""

    side: Side
    workload: Workload
    row: dict[str, Any]
    answers: list[tuple[int, ...]] = field(default_factory=list)
    generate: Generate = field(init=False)

    def __post_init__(self) -> None:
        self.generate = self.side.prepare(self.workload)

    def attempt(self, action: Callable[[], None]) -> None:
        """Run an action of this side; note an error in the row."""
        if self.row["note"]:
            return
        try:
            action()
        except torch.OutOfMemoryError:
            self.row["note"] = "out of memory"
        except Exception as error:
            traceback.print_exc()
            self.row["note"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def hardware(device: torch.device) -> str:
    """Return the GPU, or the CPU with its number of cores."""
    if device.type == "cuda":
        return name_of(device)
    with open("/proc/cpuinfo") as file:
        models = [one.partition(":")[2].strip() for one in file if one.startswith("model name")]
    gib = psutil.virtual_memory().total / 2**30
    return f"{models[0] if models else 'CPU'}, {os.cpu_count()} cores, {gib:.0f} GiB"


def keep(record: dict[str, Any], docs: Path) -> None:
    """Write a record to rollouts.json, in place of an older one of the same preset and device, and to rollouts.md."""
    page, figures = docs / "rollouts.md", docs / "rollouts.json"
    older = json.loads(figures.read_text()) if figures.exists() else []
    same = [record["preset"], record["device"]]
    records = [*(one for one in older if [one["preset"], one["device"]] != same), record]
    figures.write_text(json.dumps(records, indent=1) + "\n")
    page.write_text(with_section(page.read_text() if page.exists() else "", HEADING, runs(records)))


if __name__ == "__main__":
    run_command(main)
