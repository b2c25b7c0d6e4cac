"""Compare rollout engines: the embedded engine, a vLLM server and transformers' `generate`, with the same weights.

    python benchmarks/rollout.py [--batch 1 16 64 --repeats 5 --docs docs/results]
    python benchmarks/rollout.py --preset h100 --repeats 3 --docs docs/results  # 1.5B, bf16, one GPU, within 8 minutes
    python benchmarks/rollout.py --preset h100 --rehearse               # the same, tiny, on a CPU

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
import datetime
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu import facts, name_of
from benchmarks.pages import with_section
from benchmarks.rollout_engines import Side, embedded_side, student_stage, transformers_side
from benchmarks.rollout_measurement import Measurement
from benchmarks.rollout_page import HEADING, runs
from benchmarks.rollout_training import time_training
from benchmarks.rollout_vllm import ServerOptions, vllm_side
from benchmarks.rollout_workloads import (
    H100_SHAPE,
    H100_WORKLOADS,
    REHEARSAL_SHAPE,
    REHEARSAL_WORKLOADS,
    Shape,
    Workload,
    small_workloads,
)
from megatron_oprd.config import ParallelConfig
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.environment import find_machine
from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.types import UserError


def cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its descendants, among which is the server."""
    descendants = psutil.Process().children(recursive=True)
    times = [process.cpu_times() for process in descendants]
    return time.process_time() + sum(one.user + one.system for one in times)


CLOCKS = {"wall": time.perf_counter, "cpu": cpu_seconds}


def main(arguments: list[str] | None = None) -> int:
    options = command_line().parse_args(arguments)
    torch.set_num_threads(options.threads)
    device = choose_device("auto")
    if options.preset == "h100" and device.type != "cuda" and not options.rehearse:
        raise UserError("--preset h100 needs a CUDA device, and there is none; --rehearse runs it at tiny sizes")
    shape, workloads = sizes_of(options)
    record: dict[str, Any] = {"date": f"{datetime.date.today()}", "preset": options.preset, "device": hardware(device)}
    record |= {"versions": facts(find_machine()), "shape": vars(shape), "repeats": options.repeats}
    record |= {"threads": options.threads, "clock": options.clock, "rows": [], "training": []}
    with tempfile.TemporaryDirectory() as folder:
        measure_engines(record, shape, workloads, Path(folder), options)
        if options.train_steps:
            engines: dict[str, list[str]] = {"embedded": []}
            if options.vllm_python:
                engines["vLLM"] = ["rollout.engine=vllm", f"rollout.server.python={options.vllm_python}"]
            training = Path(folder) / "training"
            record["training"] = time_training(shape, training, engines, options.train_steps, options.threads)
    if options.docs:
        keep(record, options.docs)
    print(json.dumps(record), flush=True)
    return int(any(row["note"].startswith("failed") for row in [*record["rows"], *record["training"]]))


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=("cpu", "h100"), default="cpu", help="model shape and workloads")
    parser.add_argument("--rehearse", action="store_true", help="with --preset h100: tiny sizes, on a CPU too")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64], help="preset cpu: rows at a time")
    parser.add_argument("--workload", nargs="+", default=["equal", "mixed"], choices=["equal", "mixed"])
    parser.add_argument("--engines", nargs="+", metavar="NAME", help="only these, for example: embedded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4, help="preset cpu")
    parser.add_argument("--hidden", type=int, default=256, help="preset cpu")
    parser.add_argument("--vocabulary", type=int, default=4096, help="preset cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: CPU seconds of all processes, for a machine shared with others",
    )
    parser.add_argument("--vllm-python", help="Python of an environment of tools/rollout_server: also measure vLLM")
    parser.add_argument("--train-steps", type=int, default=0, help="also time so many training steps, 3 at least")
    parser.add_argument("--minutes", type=float, default=6.5, help="start no further workload after this time")
    parser.add_argument("--json", type=Path, help="write the record here")
    parser.add_argument(
        "--docs", type=Path, help="folder of rollouts.md and rollouts.json, to which the record is added"
    )
    return parser


def measure_engines(
    record: dict[str, Any], shape: Shape, workloads: list[Workload], folder: Path, options: argparse.Namespace
) -> None:
    """Add the versions of the engines and their rows to a record; write the record after each workload."""
    device = choose_device("auto")
    measurement = Measurement(device, CLOCKS[options.clock], options.repeats)
    with ExitStack() as stack:
        server = None
        if options.vllm_python:
            server = ServerOptions(options.vllm_python, folder / "server", workloads, options.threads, stack)
        sides = build_sides(shape, folder, device, server)
        if options.engines:
            sides = [side for side in sides if side.name in options.engines]
        record["versions"] |= {side.name: side.version for side in sides if side.version}
        begin = time.monotonic()
        for workload in workloads:
            if time.monotonic() - begin > 60 * options.minutes:
                record["rows"] += [measurement.empty_row(side, workload, "not begun: no time left") for side in sides]
                continue
            record["rows"] += measurement.run(sides, workload, shape.vocabulary)
            if options.json:
                options.json.write_text(json.dumps(record, indent=1) + "\n")


def sizes_of(options: argparse.Namespace) -> tuple[Shape, list[Workload]]:
    """Return the model shape and the workloads of the options."""
    if options.preset == "h100":
        shape, workloads = (REHEARSAL_SHAPE, REHEARSAL_WORKLOADS) if options.rehearse else (H100_SHAPE, H100_WORKLOADS)
        return shape, [one for one in workloads if one.name.partition(",")[0] in options.workload]
    hidden = options.hidden
    shape = Shape("Qwen3", options.layers, hidden, 3 * hidden, 8, 4, options.vocabulary, tied=True, deviation=0.1)
    return shape, small_workloads(options.workload, options.batch)


def build_sides(shape: Shape, folder: Path, device: torch.device, server: ServerOptions | None = None) -> list[Side]:
    """Return the engines, all with the weights of one random model; `folder` receives its Hugging Face files."""
    hf = shape.build(device)
    hf.save_pretrained(folder)
    start_process(device)
    topology = build_topology(ParallelConfig(), device, seed=0)
    machine = find_machine()
    stage, spec = student_stage(folder, topology, shape.dtype, machine)
    sides = [embedded_side(lambda: (stage, spec), topology), transformers_side(hf)]
    if device.type == "cuda" and machine.transformer_engine:
        with_te = partial(student_stage, folder, topology, shape.dtype, machine, attention="te")
        sides.append(embedded_side(with_te, topology, "embedded, Transformer Engine"))
    if server is not None:
        sides.append(vllm_side(stage, spec, topology, server))
    return sides


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
