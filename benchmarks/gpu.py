"""Measure speed and memory on one GPU next to the predictions, and add a section to docs/results/gpu.md.

    python benchmarks/gpu.py [--minutes 5.5 --repeats 5 --parts "teacher pass" cost]

Models have the paper's shape and random weights; nothing is downloaded. A line is printed for each measured case, the
tables at the end; figures go to gpu.json. Running out of memory is a result. A case that fails is reported, the
others are measured, and the exit code is 1. `--tiny` rehearses at sizes that a CPU can run, and writes no file.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import subprocess
import sys
import time
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import PAPER
from benchmarks.gpu_cases import OPRD, TEACHERS, Case, Part, all_cases, prepare
from benchmarks.gpu_flops import GPUS, Gpu, block_weights, find_gpu, predicted_seconds, sequence_lengths
from benchmarks.gpu_page import HEADING, line, runs, tables
from benchmarks.pages import installed_versions, with_section
from benchmarks.updates import AUTHORED, Update, Workload, peak_of, seconds_of
from megatron_oprd.runtime import platform
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.environment import Machine, find_machine
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = (16384, 4096)
BLOCKS_OF_7B = Workload(4, 3584, 18944, 28, 4, 1024, 256, (8192 - 256,), last=2000, dtype="bf16")
# As small as FP8 in blocks of 128 allows.
TINY = Workload(3, 128, 256, 4, 2, 512, 8, (120,), last=16, chunk=32, dtype="bf16")
PARTS = typing.get_args(Part)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a rehearsal at tiny sizes, on a CPU too")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.5, help="start no further case after this time")
    parser.add_argument("--docs", type=Path, help="folder of gpu.md and gpu.json; docs/results/, and none with --tiny")
    options = parser.parse_args(arguments)
    device = platform.choose_device("auto")
    if device.type != "cuda" and not options.tiny:
        raise UserError("benchmarks/gpu.py needs a CUDA device, and there is none; --tiny rehearses on a CPU")
    machine = find_machine()
    if device.type == "cpu":  # rehearse as an H100; Transformer Engine may be a stand-in
        machine = dataclasses.replace(machine, capability=(9, 0), cuda=(13, 0))
    model, blocks, lengths = (TINY, TINY, (128,)) if options.tiny else (PAPER, BLOCKS_OF_7B, LENGTHS)
    cases = [case for case in all_cases(model, blocks, lengths) if case.part in options.parts]
    name = name_of(device)
    rows = measure_all(cases, device, machine, options.repeats, options.minutes)
    record = {"date": f"{datetime.date.today()}", "device": name, "versions": facts(machine), "rows": rows}
    record["repeats"] = options.repeats
    print("\n".join(["", *tables(rows, name)]), flush=True)
    docs = options.docs or (None if options.tiny else ROOT / "docs" / "results")
    if docs is not None:
        keep(record, docs)
    return int(any(row["note"].startswith("failed") for row in rows))


def measure_all(
    cases: Sequence[Case], device: torch.device, machine: Machine, repeats: int, minutes: float
) -> list[dict[str, Any]]:
    """Measure each case and print its row; start no case after `minutes`."""
    begin, rows = time.monotonic(), []
    gc.collect()
    gc.freeze()  # objects from before need not be scanned after every case
    try:
        for case in cases:
            in_time = time.monotonic() - begin < 60 * minutes
            row = measure(case, device, machine, repeats) if in_time else not_run(case, "not begun: no time left")
            rows.append(row | expected(case, name_of(device)))
            print(line(rows[-1]), flush=True)
    finally:
        gc.unfreeze()
    return rows


def measure(case: Case, device: torch.device, machine: Machine, repeats: int) -> dict[str, Any]:
    """Return the row of a case and free its models."""
    try:
        row = _measure(case, device, machine, repeats)
    except torch.OutOfMemoryError:
        row = not_run(case, "out of memory")
    except UserError as error:
        row = not_run(case, f"refused: {error}")
    except Exception as error:
        traceback.print_exc()
        row = not_run(case, f"failed: {type(error).__name__}: {error_line(error)}")
    gc.collect()
    torch.cuda.empty_cache()
    return row


def _measure(case: Case, device: torch.device, machine: Machine, repeats: int) -> dict[str, Any]:
    prepared = prepare(case, device, machine)
    prepared.run()  # creates the optimizer's state and chooses kernels
    peak = peak_of(prepared.run, device)
    seconds = [seconds_on(prepared.run, device, case.in_a_row) for _ in range(repeats)]
    return {**not_run(case, ""), "seconds": seconds, "step_peak": peak, "weights": prepared.weights}


def seconds_on(run: Update, device: torch.device, in_a_row: int = 1) -> float:
    """Return the seconds of one run, between two events on the device around `in_a_row` of them."""
    if device.type == "cpu":
        return seconds_of(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(in_a_row):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / in_a_row


def not_run(case: Case, note: str) -> dict[str, Any]:
    """Return a row without figures; `note` says why there are none."""
    facts_of_case = {"part": case.part, "name": case.name, "tokens": sum(sequence_lengths(case.workload))}
    work = {"flops": case.flops.total, "passes": case.passes, "repeated": case.repeated}
    return {**facts_of_case, **work, "seconds": [], "step_peak": None, "weights": None, "note": note}


def expected(case: Case, device: str) -> dict[str, Any]:
    """Return the predictions for a case: seconds from `gpu_flops.py`, the step peak from cost.json, and the
    bytes of a teacher from its parameter count."""
    gpu = find_gpu(device)
    recomputed = case.part == "student update" and case.repeated  # as in cost.json
    method = OPRD if recomputed else case.name if case.part == "cost" else None
    return {
        "predicted_seconds": expected_seconds(case, gpu) if gpu and case.passes else None,
        "predicted_peak": predicted_peak(case.workload, method) if method else None,
        "predicted_weights": teacher_bytes(case) if case.part == "teacher pass" else None,
    }


def predicted_rows() -> list[dict[str, Any]]:
    """Return a row per case with the predicted seconds on each device of docs/results/gpu.md."""
    return [
        {
            **not_run(case, ""),
            "seconds": {name: expected_seconds(case, GPUS[name]) for name in ("H100", "H200")},
        }
        for case in all_cases(PAPER, BLOCKS_OF_7B, ())
        if case.passes
    ]


def expected_seconds(case: Case, gpu: Gpu) -> float:
    passes, kept = case.passes + case.repeated, case.bf16_blocks
    return predicted_seconds(case.workload, case.modules, gpu, passes=passes, trained=case.trained, bf16_blocks=kept)


def predicted_peak(workload: Workload, method: str) -> int | None:
    """Return the predicted peak in bytes from docs/results/cost.json, or None for a model other than the paper's."""
    (tokens,) = sequence_lengths(workload)
    if dataclasses.replace(workload, responses=PAPER.responses) != PAPER:
        return None
    method = "top-16, unchunked" if method == AUTHORED else method
    rows = json.loads((ROOT / "docs" / "results" / "cost.json").read_text())["predicted"]["rows"]
    found = [
        row["step_peak"] for row in rows if (row["method"], row["sequences"], row["tokens"]) == (method, 1, tokens)
    ]
    return found[0] if found else None


def teacher_bytes(case: Case) -> int:
    """Return the bytes of a frozen model without LM head: one per FP8 weight, two per other weight."""
    _, settings = TEACHERS[case.name]
    of_blocks = block_weights(case.workload)
    in_fp8 = of_blocks * (1 - case.bf16_blocks / case.workload.layers) if "FP8 weights" in case.name else 0
    assert ("precision.teacher_fp8=weights" in settings) == bool(in_fp8)
    return round(2 * (of_blocks + case.workload.vocabulary * case.workload.hidden) - in_fp8)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def facts(machine: Machine) -> dict[str, str]:
    """Return the versions of driver, CUDA and packages."""
    ours = {**installed_versions(), "transformer-engine": machine.transformer_engine or "none"}
    if not torch.cuda.is_available():
        return ours
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return {"driver": driver[0] if driver else "unknown", "CUDA": str(torch.version.cuda), **ours}


def keep(record: dict[str, Any], docs: Path) -> None:
    """Add the run to gpu.md and gpu.json."""
    page, figures = docs / "gpu.md", docs / "gpu.json"
    records = [*(json.loads(figures.read_text()) if figures.exists() else []), record]
    figures.write_text(json.dumps(records, indent=1) + "\n")
    page.write_text(with_section(page.read_text() if page.exists() else "", HEADING, runs(records)))
    print(f"written: {page} and {figures}", flush=True)


if __name__ == "__main__":
    run_command(main)
