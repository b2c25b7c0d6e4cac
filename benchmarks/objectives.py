"""Every objective on the demo: accuracy after equal steps and after equal time, each at its best learning rate.

    python benchmarks/objectives.py [--work DIR --output DIR --seeds 0 1 2 --steps 100 --learning-rates 1e-3 3e-3 ...
                                     --objectives oprd full_kl ...]
    python benchmarks/objectives.py --page-only    # the page and the plots again, from objectives.json

Makes the demo's pair for each seed and trains its student with each objective at each learning rate. The learning rate
of an objective is the one with the best mean greedy accuracy on validation additions; what is reported is accuracy on
held-out ones. Then each objective trains again for as many steps as fit in the time of the first one's. Each finished
run leaves a file in --work and is not run again: an interrupted benchmark continues. Changed code needs a new --work.
Writes objectives.json, objectives.md and two plots into --output (docs/results).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.objectives_page import (
    PARTS,
    TIMED_STEPS,
    WARM_UP_STEPS,
    accuracy_plot,
    learning_plot,
    markdown,
    values,
)
from benchmarks.pages import installed_versions
from examples.demo.pipeline import make_and_convert
from examples.demo.run import RECIPES
from examples.demo.task import split_additions, write_rows
from megatron_oprd import train
from megatron_oprd.config import load_config
from megatron_oprd.evaluate import evaluate_model
from megatron_oprd.evaluation.scores import score
from megatron_oprd.launch.evaluation_inputs import read_evaluation_inputs

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 4
ALONE = "loss.representation.weight=0"
FULL_KL = "loss.output.objective=full_kl"
OBJECTIVES: dict[str, tuple[str, ...]] = {
    "oprd": (),
    "oprd_last": ("loss.representation.layers=last",),
    "sampled": (ALONE, "loss.output.objective=sampled"),
    "top4_surrogate": (ALONE, "loss.output.objective=topk_surrogate", "loss.output.k=4"),
    "top4_kl": (ALONE, "loss.output.objective=topk_kl", "loss.output.k=4"),
    "full_kl": (ALONE, FULL_KL),
    "full_kl_forward": (ALONE, FULL_KL, "loss.output.direction=forward"),
    "jsd": (ALONE, FULL_KL, "loss.output.direction=jsd", "loss.output.beta=0.5"),
    "oprd_full_kl": (FULL_KL,),
}


@dataclass(frozen=True)
class Trial:
    """A training run of this benchmark."""

    objective: str
    learning_rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.objective}-lr{self.learning_rate:g}-seed{self.seed}-steps{self.steps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "objectives", help="pairs and finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--objectives", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "objectives.json"
    if not options.page_only:
        torch.set_num_threads(1)  # as the demo
        file.write_text(json.dumps(measure(options), indent=1) + "\n")
    record = json.loads(file.read_text())
    (options.output / "objectives.md").write_text(markdown(record))
    (options.output / "objectives-accuracy.svg").write_text(accuracy_plot(record))
    (options.output / "objectives-learning.svg").write_text(learning_plot(record))
    print(options.output / "objectives.md")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run every learning rate at equal steps, time a step, then run the best learning rates for equal time."""
    work, rates, objectives = options.work, sorted(options.learning_rates), options.objectives
    work.mkdir(parents=True, exist_ok=True)
    before = {seed: make_inputs(work, seed) for seed in options.seeds}
    equal_steps = [
        run_trial(work, Trial(objective, rate, seed, options.steps))
        for seed in options.seeds
        for rate in rates
        for objective in objectives
    ]
    best = {objective: best_rate(equal_steps, objective, rates) for objective in objectives}
    rounds = min(ROUNDS, options.steps)  # a shortened benchmark also times fewer rounds
    seconds = measure_seconds(work, objectives, options.seeds[0], rounds)
    budget = options.steps * seconds[objectives[0]]["step"]
    steps = {objective: max(1, round(budget / seconds[objective]["step"])) for objective in objectives}
    equal_time = [
        run_trial(work, Trial(objective, best[objective], seed, steps[objective]))
        for seed in options.seeds
        for objective in objectives
    ]
    return {
        "versions": installed_versions(),
        "steps": options.steps,
        "seeds": options.seeds,
        "learning_rates": rates,
        "objectives": {objective: OBJECTIVES[objective] for objective in objectives},
        "pairs": before,
        "best_learning_rate": best,
        "rounds": rounds,
        "seconds": seconds,
        "equal_time_steps": steps,
        "equal_steps": equal_steps,
        "equal_time": equal_time,
    }


def make_inputs(work: Path, seed: int) -> dict[str, dict[str, float]]:
    """Make the models and validation problems of a seed on disk; return the accuracies of student and teacher."""
    pair = work / f"pair-{seed}"
    alone(work, make_and_convert, pair, seed)
    write_rows(pair / "validation.jsonl", split_additions(seed).validation)

    def evaluate() -> dict[str, dict[str, float]]:
        return {name: accuracies(work, pair, pair / name, evaluation(pair, seed)) for name in ("student", "teacher")}

    return once(work / f"pair-{seed}.json", evaluate)


def run_trial(work: Path, trial: Trial) -> dict[str, Any]:
    """Train, export and evaluate; the run folder is deleted once its accuracies are stored."""
    pair, folder = work / f"pair-{trial.seed}", work / trial.name

    def run() -> dict[str, Any]:
        train_student(pair, folder, trial, export=True)
        result = asdict(trial) | accuracies(work, pair, folder / "hf", evaluation(pair, trial.seed))
        shutil.rmtree(folder)
        return result

    return once(work / f"{trial.name}.json", run)


def measure_seconds(work: Path, objectives: Sequence[str], seed: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time a step and its parts: short runs of all objectives in alternation; the median step of the fastest run."""
    found: dict[str, list[dict[str, float]]] = {objective: [] for objective in objectives}
    for number in range(rounds):
        for objective in objectives:
            folder = work / f"timed-{objective}-{number}"
            trial = Trial(objective, 1e-3, seed, TIMED_STEPS)

            def run(folder: Path = folder, trial: Trial = trial) -> dict[str, float]:
                train_student(work / f"pair-{seed}", folder, trial, export=False)
                lines = (folder / "metrics.jsonl").read_text().splitlines()[WARM_UP_STEPS:]
                shutil.rmtree(folder)
                return {part: statistics.median(json.loads(line)[f"time/{part}"] for line in lines) for part in PARTS}

            found[objective].append(once(folder.with_suffix(".json"), run))
    return {objective: min(medians, key=lambda median: median["step"]) for objective, medians in found.items()}


def train_student(pair: Path, folder: Path, trial: Trial, *, export: bool, settings: Sequence[str] = ()) -> None:
    """Train with the demo's recipe and `settings`, without evaluations and checkpoints during training."""
    overrides = [
        *shared_settings(pair, folder, trial.seed),
        f"student.path={pair / 'student-megatron'}",
        f"train.steps={trial.steps}",
        f"optimizer.lr={trial.learning_rate}",
        "checkpoint.every=0",
        f"checkpoint.export_hf={str(export).lower()}",
        "evaluation.every=0",
        "evaluation.data=[]",
        "loss.output.metrics_every=0",
        *OBJECTIVES[trial.objective],
        *settings,
    ]
    shutil.rmtree(folder, ignore_errors=True)
    alone(pair.parent, train.main, ["--config", str(RECIPES["same_architecture"]), *overrides])


def accuracies(work: Path, pair: Path, model: Path, arguments: Sequence[str]) -> dict[str, float]:
    """Return the exact-match accuracy of a Hugging Face folder on validation (greedy) and held-out problems (greedy and
    at temperature 0.7). `arguments` are those of `evaluate`, with the recipe."""
    found = {}
    for name, data, temperature in (
        ("validation", "validation", 0.0),
        ("greedy", "heldout", 0.0),
        ("sampled", "heldout", 0.7),
    ):
        settings = [
            f"student.path={model}",
            f"evaluation.data=[{pair / data}.jsonl]",
            f"evaluation.temperature={temperature}",
            "evaluation.top_p=1.0",
        ]
        found[name] = alone(work, accuracy, [*arguments, *settings])
    return found


def accuracy(arguments: Sequence[str]) -> float:
    """Return the accuracy of the model at `student.path` with one answer per problem."""
    _, recipe, *overrides = arguments
    samples = evaluate_model(read_evaluation_inputs(load_config(recipe, overrides))).samples
    return score(samples, 1)["avg@1"]


def evaluation(pair: Path, seed: int) -> list[str]:
    """Return the arguments of `evaluate` for a model pair of this benchmark."""
    return ["--config", str(RECIPES["same_architecture"]), *shared_settings(pair, pair, seed)]


def shared_settings(pair: Path, folder: Path, seed: int) -> list[str]:
    teacher, prompts = f"teacher.path={pair / 'teacher-megatron'}", f"data.prompts=[{pair / 'train.jsonl'}]"
    return [teacher, prompts, f"train.run_dir={folder}", f"train.seed={seed}", "train.device=cpu"]


def once(file: Path, make: Callable[[], Any]) -> Any:
    """Return the result of `make`, read from the file if an earlier run stored it."""
    if not file.exists():
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(make()) + "\n")
        fresh.rename(file)
        print(f"{file.stem}: done", flush=True)
    return json.loads(file.read_text())


def alone(work: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process, so that no run changes the state of the next; append its output to
    `log.txt`."""
    with (
        (work / "log.txt").open("a") as file,
        contextlib.redirect_stdout(file),
        multiprocessing.get_context("fork").Pool(1) as pool,
    ):
        return pool.apply(function, arguments)


def best_rate(runs: Sequence[dict[str, Any]], objective: str, rates: Sequence[float]) -> float:
    """Return the learning rate with the best mean validation accuracy; of equal ones the lowest."""
    return max(rates, key=lambda rate: statistics.mean(values(runs, "validation", objective, rate)))


if __name__ == "__main__":
    main()
