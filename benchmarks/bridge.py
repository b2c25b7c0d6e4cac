"""Measure OPRD-Bridge on tiny unlike models: a bridge alone, output-space objectives alone, and both together.

    python benchmarks/bridge.py [--work DIR --output DIR --seeds 0 1 2 --steps 100 --kinds cross_architecture ...
                                 --learning-rates 1e-3 3e-3 --methods bridge full_kl ...]
    python benchmarks/bridge.py --page-only    # the page and the plots again, from bridge.json

For each kind of model pair and each seed, the benchmark creates the pair of the demo, fits bridges of all ranks and
trains the student with each method and learning rate. It measures what a bridge alone changed in the student, and
provokes a collapse. Each finished part has a file in --work and is not repeated; use a new --work after a change of the
code. The results go to --output (default docs/results): bridge.json, the figures in bridge.md and the plots.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bridge_drift import what_moved
from benchmarks.bridge_page import cosine_plot, put_figures
from benchmarks.objectives import accuracies, alone, once
from benchmarks.pages import installed_versions
from examples.demo.make_bridge_pair import parts_of
from examples.demo.pipeline import make_unlike
from megatron_oprd import train
from megatron_oprd.bridge import fit

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("cross_architecture", "cross_tokenizer")
RANK = {"cross_architecture": 8, "cross_tokenizer": 4}
NO_BRIDGE = ("loss.representation.bridge=null", "loss.representation.weight=0")
BRIDGE_ALONE = ("loss.schedule=null", "loss.output.objective=none")  # recipes with one vocabulary fade the bridge
FULL_KL = "loss.output.objective=full_kl"
TOP_16 = ("loss.output.objective=topk_surrogate", "loss.output.k=16")
TRAINED = "loss.representation.train_bridge=true"
FADE = "loss.schedule={representation: [[0, 1.0], [10, 0.0]], output: [[0, 0.0], [10, 1.0]]}"
SWITCH = "loss.schedule={representation: [[9, 1.0], [10, 0.0]], output: [[9, 0.0], [10, 1.0]]}"
# LastOPD: the last layer, by a map of full width in place of a bridge.
LAST_BY_MAP = (
    *("loss.representation.bridge=null", "loss.representation.map.kind=mlp", "loss.representation.layers=last"),
    *("loss.representation.weight=1000", "loss.representation.aggregation=token_mean"),
)
# Training methods. Output-space objectives need one vocabulary.
METHODS: dict[str, tuple[str, ...]] = {
    "bridge_mu1": ("loss.representation.weight=1",),
    "bridge": ("loss.representation.weight=10",),
    "bridge_mu100": ("loss.representation.weight=100",),
    "bridge_trained": (TRAINED,),
    "top16": (*NO_BRIDGE, *TOP_16),
    "full_kl": (*NO_BRIDGE, FULL_KL),
    "both_mu01": (FULL_KL, "loss.representation.weight=0.1"),
    "both_mu1": (FULL_KL, "loss.representation.weight=1"),
    "both": (FULL_KL, "loss.representation.weight=10"),
    "fade": (FULL_KL, FADE),
    "switch": (FULL_KL, SWITCH),
    "fade_map": (FULL_KL, *LAST_BY_MAP, FADE),
}
# Additional learning rates: a bridge alone may need a smaller one, both together may allow a larger one.
MORE_RATES = {
    **dict.fromkeys(("bridge", "bridge_trained"), (3e-4,)),
    **dict.fromkeys(("full_kl", "both_mu1", "both"), (1e-2,)),
}
ACROSS_TOKENIZERS = ("bridge_mu1", "bridge", "bridge_mu100", "bridge_trained")
# Settings of the provoked collapse: two directions per layer and a constant high learning rate.
COLLAPSE_RANK, COLLAPSE_STEPS, COLLAPSE_RATE = 2, 120, 3e-3
COLLAPSE = ("optimizer.schedule=constant", "optimizer.warmup_fraction=0.3")


@dataclass(frozen=True)
class Trial:
    """Settings of a training run."""

    kind: str
    method: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}-steps{self.steps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bridge", help="pairs and finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "bridge.json"
    if not options.page_only:
        torch.set_num_threads(1)
        file.write_text(json.dumps(measure(options), indent=1) + "\n")
    record = json.loads(file.read_text())
    put_figures(options.output / "bridge.md", record)
    for kind in record["kinds"]:
        (options.output / f"bridge-{kind.replace('_', '-')}.svg").write_text(cosine_plot(record["kinds"][kind]))
    print(options.output / "bridge.md")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all parts and return the content of bridge.json."""
    options.work.mkdir(parents=True, exist_ok=True)
    pairs = [(kind, seed) for kind in options.kinds for seed in options.seeds]
    trials = [
        Trial(kind, method, rate, seed, options.steps)
        for seed in options.seeds
        for kind in options.kinds
        for method in options.methods
        if kind == "cross_architecture" or method in ACROSS_TOKENIZERS
        for rate in sorted({*MORE_RATES.get(method, ()), *options.learning_rates})
    ]
    prepared = [prepare(options.work, *pair) for pair in pairs]
    runs = [run_trial(options.work, trial) for trial in trials]
    collapses = [collapse(options.work, *pair, min(COLLAPSE_STEPS, 2 * options.steps)) for pair in pairs]
    return {
        "versions": installed_versions(),
        "steps": options.steps,
        "seeds": options.seeds,
        "learning_rates": sorted({trial.learning_rate for trial in trials}),
        "kinds": {
            kind: {
                "rank": RANK[kind],
                "pairs": [one for (of, _), one in zip(pairs, prepared, strict=True) if of == kind],
                "runs": [run for run, trial in zip(runs, trials, strict=True) if trial.kind == kind],
                "collapses": [one for (of, _), one in zip(pairs, collapses, strict=True) if of == kind],
            }
            for kind in options.kinds
        },
    }


def prepare(work: Path, kind: str, seed: int) -> dict[str, Any]:
    """Create the pair of a seed and its bridges. Return the student's accuracies and the statistics of the fit."""
    folder = folder_of(work, kind, seed)

    def make() -> dict[str, Any]:
        alone(work, make_unlike, folder / "pair", kind, seed)
        alone(work, fit.main, arguments(work, kind, seed))
        found = json.loads((folder / "bridge" / "fit.json").read_text())
        for one in found["fits"]:
            del one["eigenvalues"]  # long, and in the bridges themselves
        for model in ("student", "teacher"):
            found["origin"][model]["path"] = f"pair/{model}"
        return {"seed": seed, "student": accuracies_of(work, kind, seed, folder / "pair" / "student"), "fit": found}

    return once(work / f"{folder.name}.json", make)


def run_trial(work: Path, trial: Trial) -> dict[str, Any]:
    """Train and evaluate a student and, for a bridge alone, measure what moved. Delete the folder of the run."""
    run_dir = work / trial.name

    def run() -> dict[str, Any]:
        started = train_student(work, trial, run_dir, *METHODS[trial.method])
        result: dict[str, Any] = {
            "method": trial.method,
            "learning_rate": trial.learning_rate,
            "seed": trial.seed,
            **accuracies_of(work, trial.kind, trial.seed, run_dir / "hf"),
            "cosines": [line["rep/cosine"] for line in started if "rep/cosine" in line][:: max(trial.steps // 10, 1)],
        }
        if trial.method.startswith("bridge"):
            pair, rank = folder_of(work, trial.kind, trial.seed), RANK[trial.kind]
            width = parts_of(trial.kind)[0].answer_width
            result["moved"] = alone(work, what_moved, pair, run_dir / "hf", rank, width)
        shutil.rmtree(run_dir)
        return result

    return once(work / f"{trial.name}.json", run)


def collapse(work: Path, kind: str, seed: int, steps: int = COLLAPSE_STEPS) -> dict[str, Any]:
    """Provoke a collapse with a bridge of low rank. Return accuracy, cosine, perplexity and warnings by step."""
    trial = Trial(kind, "collapse", COLLAPSE_RATE, seed, steps)
    run_dir = work / trial.name

    def run() -> dict[str, Any]:
        folder = folder_of(work, kind, seed)
        narrow = f"loss.representation.bridge={folder / 'bridge' / f'rank_{COLLAPSE_RANK}'}"
        often = ("evaluation.every=5", "health.every=5", "health.max_new_tokens=8")
        data = f"evaluation.data=[{folder / 'pair' / 'validation.jsonl'}]"
        lines = train_student(work, trial, run_dir, narrow, *COLLAPSE, *often, data)
        evaluations, checks, warnings = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            for file in (
                run_dir / name for name in ("evaluations.jsonl", "health/checks.jsonl", "health/warnings.jsonl")
            )
        )
        return {
            "seed": seed,
            "learning_rate": COLLAPSE_RATE,
            "accuracy": [[one["step"], next(iter(one["data"].values()))["avg@1"]] for one in evaluations],
            "cosine": [[line["step"], line["rep/cosine"]] for line in lines],
            "perplexity": [[check["step"], check["perplexity"]] for check in checks],
            "warnings": warnings,
        }

    return once(work / f"{trial.name}.json", run)


def train_student(work: Path, trial: Trial, run_dir: Path, *settings: str) -> list[dict[str, float]]:
    """Train a student by the recipe and return its metrics. Evaluations and checkpoints are off by default."""
    shutil.rmtree(run_dir, ignore_errors=True)
    quiet = (
        "evaluation.every=0",
        "evaluation.data=[]",
        "health.every=0",
        "checkpoint.every=0",
        "loss.output.metrics_every=0",
    )
    overrides = [f"train.steps={trial.steps}", f"optimizer.lr={trial.learning_rate}", f"train.run_dir={run_dir}"]
    alone(work, train.main, [*arguments(work, trial.kind, trial.seed), *quiet, *overrides, *settings])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def arguments(work: Path, kind: str, seed: int) -> list[str]:
    """Return the command-line arguments of the demo's recipe for a pair of this benchmark."""
    folder = folder_of(work, kind, seed)
    paths = {
        "student.path": folder / "pair" / "student",
        "teacher.path": folder / "pair" / "teacher",
        "data.prompts": f"[{folder / 'pair' / 'train.jsonl'}]",
        "loss.representation.bridge": folder / "bridge" / f"rank_{RANK[kind]}",
        "train.run_dir": folder,
    }
    recipe = ROOT / "examples" / f"demo_{kind}.yaml"
    chosen = [f"{key}={value}" for key, value in paths.items()]
    return ["--config", str(recipe), *BRIDGE_ALONE, *chosen, f"train.seed={seed}", "train.device=cpu"]


def accuracies_of(work: Path, kind: str, seed: int, model: Path) -> dict[str, float]:
    return accuracies(work, folder_of(work, kind, seed) / "pair", model, arguments(work, kind, seed))


def folder_of(work: Path, kind: str, seed: int) -> Path:
    return work / f"{kind}-{seed}"


if __name__ == "__main__":
    main()
