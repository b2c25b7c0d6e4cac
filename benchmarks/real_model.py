"""The demo with a real model, trained on hidden states, on next-token distributions, and on both.

    python benchmarks/real_model.py [--work DIR --output DIR --seeds 0 1 2 --objectives both hidden_states full_kl]

Runs `examples/run_oprd_qwen.sh demo=real_model` for each objective and seed, one after the other. The start model, the
held-out instructions and the teacher's answers are the same in all runs; a seed changes the order of the prompts and
the rollouts. Each finished run leaves a file in --work and is not run again, so an interrupted benchmark goes on.
Writes real_model.json with all finished runs into --output (docs/results) after each run, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.objectives import once
from benchmarks.pages import installed_versions, table_lines

ROOT = Path(__file__).resolve().parents[1]
# The demo's recipe trains on both.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "both": (),
    "hidden_states": ("loss.representation.weight=1", "loss.output.objective=none"),
    "full_kl": ("loss.representation.weight=0",),
}
# metric of an evaluation -> name in the table
METRICS = {
    "perplexity": "perplexity",
    "forward_kl": "KL(teacher, student)",
    "reverse_kl": "KL(student, teacher)",
    "argmax_agreement": "most likely token in common",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_model", help="models and finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for objective in options.objectives:
            once(options.work / f"{objective}-{seed}.json", partial(run_demo, options.work, objective, seed))
            results = {"versions": installed_versions(), "runs": finished_runs(options.work)}
            (options.output / "real_model.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(table(results["runs"])))


def finished_runs(work: Path) -> list[dict[str, Any]]:
    """Return the figures of all finished runs, by objective and seed."""
    paths = [work / f"{objective}-{seed}.json" for objective in OBJECTIVES for seed in range(100)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def run_demo(work: Path, objective: str, seed: int) -> dict[str, Any]:
    """Run the demo with one objective, unless its folder is complete, and return the metrics before and after.

    `cpu_seconds` is the user time of the run, without the time to download the model.
    """
    folder = work / f"{objective}-{seed}"
    settings = [f"train.run_dir={folder}", f"train.seed={seed}", f"evaluation.answers_dir={work / 'teacher_answers'}"]
    command = [sys.executable, str(ROOT / "examples" / "run_oprd_qwen.sh"), "demo=real_model", *settings]
    found: dict[str, Any] = {"objective": objective, "seed": seed}
    if not (folder / "hf").exists():
        cpu_before = _cpu_seconds()
        subprocess.run([*command, *OBJECTIVES[objective]], check=True)
        found["cpu_seconds"] = _cpu_seconds() - cpu_before
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for name, evaluation in (("before", evaluations[0]), ("after", evaluations[-1])):
        (found[name],) = evaluation["data"].values()
    found["steps"] = evaluations[-1]["step"]
    return found


def _cpu_seconds() -> float:
    """Return the user time of all processes that this one has started and waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of docs/real_model.md: a row for the start model, then one for each run."""
    head = ["trained on", "seed", *METRICS.values(), "gap closed", "CPU seconds"]
    rows: list[list[Any]] = [["nothing: the pruned model", "", *_figures(runs[0]["before"]), "", ""]]
    for run in runs:
        gap, rest = (run[name]["perplexity"] - run[name]["teacher_perplexity"] for name in ("before", "after"))
        cpu = f"{run['cpu_seconds']:.0f}" if "cpu_seconds" in run else ""
        objective = run["objective"].replace("_", " ")
        rows.append([objective, run["seed"], *_figures(run["after"]), f"{1 - rest / gap:.0%}", cpu])
    return table_lines(head, rows)


def _figures(metrics: Mapping[str, float]) -> list[str]:
    return [f"{metrics[name]:.3f}" for name in METRICS]


if __name__ == "__main__":
    main()
