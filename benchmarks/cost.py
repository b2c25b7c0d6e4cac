"""Write docs/results/cost.md: memory and time of an update by objective.

    python benchmarks/cost.py [--parts predicted measured --repeats 7]

`predicted`: memory at the paper's size. The real Megatron model, optimizer and losses run on tensors with sizes but
without values (`megatron_oprd/planning/update_trace.py`), so nothing of that size is allocated and nothing is timed.
`measured`: seconds and memory of updates on this machine (`benchmarks/updates.py`), next to the same updates in plain
Hugging Face and torch. The model has the paper's ratio of LM head to blocks; on a GPU it is the paper's model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost_page import markdown
from benchmarks.pages import installed_versions
from benchmarks.updates import AUTHORED, LOSSES_IN_TORCH, METHODS, Workload
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.launch.setup import Setup
from megatron_oprd.models.precision import PLAIN, ModelPrecision, Precision
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.update_trace import Footprint, trace_update
from tests.helpers.memory import HONEST

ROOT = Path(__file__).resolve().parents[1]
PROMPT_TOKENS = 256
# DeepSeek-R1-Distill-Qwen-1.5B, the paper's student; its teacher has the same size.
PAPER = Workload(28, 1536, 8960, 12, 2, 151936, PROMPT_TOKENS, (16384 - PROMPT_TOKENS,), last=2000, dtype="bf16")
# The same shape at an eighth of the width: equal ratios of LM head to blocks and of vocabulary to MLP, which decide
# time and memory; `last` is as large a part of a response, and `chunk` divides the tokens into about as many chunks as
# `auto` does at the paper's size.
SMALL = Workload(28, 192, 1120, 3, 1, 18992, 64, (640, 384, 256, 128), last=79, chunk=220)
ON_TRANSFORMER_ENGINE = ("OPRD, last tokens", "top-16, unchunked")  # methods whose memory is predicted on its modules
ON_A_GPU = dataclasses.replace(PAPER, responses=(8192 - PROMPT_TOKENS,))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("predicted", "measured"), default=("predicted", "measured"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, AUTHORED], default=[*METHODS, AUTHORED])
    parser.add_argument(
        "--layers", type=int, default=PAPER.layers, help="layers of the model whose memory is predicted"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 2, 8], help="sequences of a micro-batch")
    parser.add_argument("--workload", type=json.loads, help="JSON: other sizes of the measured model")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "cost.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "results" / "cost.md")
    options = parser.parse_args()
    record = json.loads(options.json.read_text()) if options.json.exists() else {}
    if "predicted" in options.parts:
        paper = dataclasses.replace(PAPER, layers=options.layers)
        rows = predict(paper, options.methods, options.sequences, options.tokens)
        record["predicted"] = {"versions": installed_versions(), "layers": options.layers, "rows": rows}
        record["predicted_with_transformer_engine"] = {
            method: step_peak(footprint_of(paper, method, ModelPrecision(transformer_engine=True)))
            for method in ON_TRANSFORMER_ENGINE
        }
    if "measured" in options.parts:
        workload = dataclasses.replace(ON_A_GPU if torch.cuda.is_available() else SMALL, **options.workload or {})
        place = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU core"
        place += f", {workload.layers} layers of width {workload.hidden}"
        record.setdefault("measured", {})[place] = measure(workload, options.methods, options.repeats)
    options.json.write_text(json.dumps(record, indent=1) + "\n")
    on_gpu = ROOT / "docs" / "results" / "gpu.json"
    options.markdown.write_text(markdown(record, json.loads(on_gpu.read_text())))


def predict(paper: Workload, methods: list[str], sequences: list[int], tokens: list[int]) -> list[dict[str, Any]]:
    """Return the footprint of an update on one process for every method, length and number of sequences."""
    rows = []
    for count in sequences:
        for length in tokens:
            workload = dataclasses.replace(paper, responses=(length - PROMPT_TOKENS,) * count)
            for method in filter(METHODS.__contains__, methods):
                parts = dataclasses.asdict(footprint := footprint_of(workload, method))
                row = {"method": method, "sequences": count, "tokens": length, **parts}
                rows.append(row | {"step_peak": step_peak(footprint)})
                print(rows[-1], flush=True)
    return rows


def footprint_of(workload: Workload, method: str, modules: ModelPrecision = PLAIN) -> Footprint:
    """Trace an update without values and return the bytes alive at its peak."""
    config, spec = workload.config(method), workload.spec
    lengths = Lengths(workload.prompt + max(workload.responses), max(workload.responses))
    teacher = plan_teacher(config, spec, spec)
    setup = Setup(spec, teacher.plan.student_stages, {"": teacher}, Precision(modules, modules), 1, None)
    run = PlannedRun(config, setup, lengths)
    return trace_update(run, workload.rollouts(), rank=0)


def step_peak(footprint: Footprint) -> int:
    """Return the peak without weights, gradients, optimizer state and teacher, in bytes."""
    return footprint.targets + footprint.activations


def measure(workload: Workload, methods: list[str], repeats: int) -> dict[str, Any]:
    """Return the seconds of each repeat and the peak of every method.

    On a CPU the methods alternate, so that load from other processes affects all of them alike; a GPU has memory for
    one method at a time.
    """
    pairs = [("megatron_oprd", method) for method in methods]
    pairs += [("plain torch", method) for method in LOSSES_IN_TORCH if method in methods]
    seconds: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for some in [[pair] for pair in pairs] if torch.cuda.is_available() else [pairs]:
        running = {pair: Updates(*pair, workload) for pair in some}
        for _ in range(repeats):
            for pair, updates in running.items():
                seconds[pair].append(updates.ask("time"))
                print(*pair, seconds[pair][-1], flush=True)
        for updates in running.values():
            updates.end()
    rows = []
    for side, method in pairs:
        alone = Updates(side, method, workload, HONEST)
        row = {"side": side, "method": method, "seconds": seconds[side, method], "step_peak": alone.ask("peak")}
        alone.end()
        if side == "megatron_oprd" and not torch.cuda.is_available():
            row["predicted"] = step_peak(footprint_of(workload, method))
        rows.append(row)
        print(side, method, statistics.median(row["seconds"]), row["step_peak"], row.get("predicted"), flush=True)
    return {"versions": installed_versions(), "workload": dataclasses.asdict(workload), "rows": rows}


class Updates:
    """A process that runs updates of one method on request."""

    def __init__(self, side: str, method: str, workload: Workload, environment: dict[str, str] | None = None) -> None:
        sizes = json.dumps(dataclasses.asdict(workload))
        command = [sys.executable, str(ROOT / "benchmarks" / "updates.py"), side, method, sizes]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **threads, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, what: str) -> float:
        """Run one more update and return its `time` in seconds or its `peak` in bytes."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return float(self._process.stdout.readline())

    def end(self) -> None:
        self._process.communicate()


if __name__ == "__main__":
    main()
