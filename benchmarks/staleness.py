"""The demo distilled with rollouts of the present weights and with rollouts that are one update old.

    python benchmarks/staleness.py [--work DIR --output DIR --seeds 0 1 2 3 4 --steps 100 --objectives oprd full_kl ...]
    python benchmarks/staleness.py --page-only    # the page again, from staleness.json

Trains the demo's student with `rollout.ahead` 0 and 1, for each seed and objective, at the learning rate that
docs/results/objectives.md found best. The embedded engine generates the rollouts, so `ahead` changes which weights
sample them and saves no time.
Each finished run leaves a file in --work and is not run again, so an interrupted benchmark goes on.
Writes staleness.json and staleness.md into --output (docs/results).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.objectives import Trial, accuracies, evaluation, make_inputs, once, train_student
from benchmarks.pages import installed_versions
from benchmarks.staleness_page import AHEAD, markdown

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATES = {"oprd": 3e-3, "full_kl": 3e-3, "full_kl_forward": 3e-3, "sampled": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "staleness", help="pairs and finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--objectives", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    file = options.output / "staleness.json"
    if not options.page_only:
        torch.set_num_threads(1)  # as the demo
        options.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(measure(options), indent=1) + "\n")
    (options.output / "staleness.md").write_text(markdown(json.loads(file.read_text())))
    print(options.output / "staleness.md")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Make the pair of each seed, train every objective both ways, and return the accuracies."""
    pairs = {seed: make_inputs(options.work, seed) for seed in options.seeds}
    runs = [
        run_trial(options.work, Trial(objective, LEARNING_RATES[objective], seed, options.steps), ahead)
        for seed in options.seeds
        for objective in options.objectives
        for ahead in AHEAD
    ]
    return {"versions": installed_versions(), "steps": options.steps, "pairs": pairs, "runs": runs}


def run_trial(work: Path, trial: Trial, ahead: int) -> dict[str, Any]:
    """Train, export and evaluate; the run folder is deleted once its figures are stored."""
    pair, folder = work / f"pair-{trial.seed}", work / f"{trial.name}-ahead{ahead}"

    def run() -> dict[str, Any]:
        train_student(pair, folder, trial, export=True, settings=(f"rollout.ahead={ahead}",))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        found = {"ahead": ahead, "staleness": statistics.mean(row["rollout/staleness"] for row in rows)}
        found |= accuracies(work, pair, folder / "hf", evaluation(pair, trial.seed))
        shutil.rmtree(folder)
        return asdict(trial) | found

    return once(work / f"{folder.name}.json", run)


if __name__ == "__main__":
    main()
