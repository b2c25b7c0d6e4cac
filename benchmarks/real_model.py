"""The demo's real model, healed by every method from the same start: perplexity by step and by second.

    python benchmarks/real_model.py [--work DIR --output DIR --seeds 0 1 2 --methods hidden_states full_kl ...
                                     --learning-rates 1e-4 2e-4 ... --equal-time --parallel 14 --minutes 10]
    python benchmarks/real_model.py --page-only    # the tables and the plots again, from real_model.json

The models, the prompts and the recipe are those of `examples/run_oprd_qwen.sh demo=real_model`. The pruned model, the
held-out instructions and the teacher's answers to them are the same in all runs; a seed changes the order of the
prompts and the rollouts. The trials run in the order of what they tell: all methods with the recipe's learning rate,
then other learning rates of four methods, then equal time, then methods beyond the paper, then more seeds of the
learning rates. `--equal-time` trains a method again for as many steps as fit into the time of the demo's recipe: CPU
time, or on a GPU the time of its steps. With `--parallel` trials share a GPU, and so do their times.

Each finished trial leaves a file in --work and is not run again, so an interrupted benchmark goes on. A trial that
ended early leaves its evaluations in --work/stopped, and is run again. Writes real_model.json with all trials into
--output (docs/results) after each of them, plots at the end, and prints the tables of docs/real_model.md. Trials of
another device in real_model.json are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import yaml

from benchmarks.objectives import once
from benchmarks.pages import installed_versions
from benchmarks.real_model_answers import OwnAnswers, teacher_rollouts
from benchmarks.real_model_methods import EQUAL_TIME, LATER, METHODS, REFERENCE, SWEPT
from benchmarks.real_model_page import plots, tables
from benchmarks.trial_pool import TimeIsUp, TrialFailed, TrialPool
from examples.demo.run import RECIPES
from examples.real_model.pipeline import TEACHER, prepare
from megatron_oprd.models.layer_pairs import pairs_of_kept_blocks

GPU_BYTES_OF_A_TRIAL, GPU_BYTES_OF_THIS_PROCESS = 7e9, 4e9  # measured on an H100: up to 6.5 GiB, and 3.8
ROOT = Path(__file__).resolve().parents[1]
RECIPE = RECIPES["real_model"]
RECIPE_VALUES = yaml.safe_load(RECIPE.read_text())
STEPS, RATE = RECIPE_VALUES["train"]["steps"], float(RECIPE_VALUES["optimizer"]["lr"])
PROMPTS_PER_STEP = RECIPE_VALUES["rollout"]["prompts_per_step"]
LONGEST_ANSWER = RECIPE_VALUES["rollout"]["max_new_tokens"]
EVALUATIONS = 3  # besides the one before the training
WARM_UP_STEPS = 3  # without time: the first steps on a GPU compile functions and capture graphs
PRUNED = "pruned"  # the start model, among the answers of students
PARTS = ("step", "rollout", "teacher", "student")  # of the time of a step


@dataclass(frozen=True)
class Trial:
    """A training run of this benchmark."""

    method: str
    seed: int
    learning_rate: float = RATE
    steps: int = STEPS
    equal_time: bool = False  # as many steps as fit into the time of the recipe; `for_equal_time` counts them

    @property
    def name(self) -> str:
        """Return the name of the run's folder; values of the recipe are left out."""
        rate = "" if self.learning_rate == RATE else f"-lr{self.learning_rate:g}"
        steps = "" if self.steps == STEPS else f"-steps{self.steps}"
        return f"{self.method}-{self.seed}{rate}" + ("-time" if self.equal_time else steps)


@dataclass(frozen=True)
class Bench:
    """The settings that all trials of a call of this benchmark share."""

    work: Path
    output: Path
    device: str  # "CPU" or the name of the GPU
    settings: Sequence[str]  # key=value arguments of every trial, besides those of its method
    pool: TrialPool
    own_answers: OwnAnswers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_model", help="models and finished trials")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--equal-time", action="store_true", help="also run methods for the time of the recipe")
    parser.add_argument("--parallel", type=int, default=1, help="trials at the same time, each in its own process")
    parser.add_argument("--minutes", type=float, help="stop after this time, begin no trial that cannot end before")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of all trials")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    failed = 0
    if not options.page_only:
        options.work.mkdir(parents=True, exist_ok=True)
        prepare(options.work / TEACHER, options.work)
        torch.set_num_threads(1)  # the trials need the other cores
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        pool = TrialPool(min(options.parallel, trials_that_fit()), options.minutes)
        own = OwnAnswers(options.work / "own", options.work / TEACHER, options.work / "heldout.jsonl", LONGEST_ANSWER)
        bench = Bench(options.work, options.output, device, options.set, pool, own)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped by SIGTERM"))  # ends the trials too
        failed = run_trials(bench, planned_trials(options))
    record = json.loads((options.output / "real_model.json").read_text())
    for name, plot in plots(record).items():
        (options.output / f"real_model-{name}.svg").write_text(plot)
    print("\n".join(tables(record)))
    return int(failed > 0)


def trials_that_fit() -> int:
    """Return how many trials have room on the GPU at the same time; without one, as many as there are cores."""
    if not torch.cuda.is_available():
        return os.cpu_count() or 1
    return max(1, int((torch.cuda.mem_get_info()[0] - GPU_BYTES_OF_THIS_PROCESS) // GPU_BYTES_OF_A_TRIAL))


def planned_trials(options: argparse.Namespace) -> list[Trial]:
    """Return the trials of a call, those that tell most first."""
    seeds, methods = options.seeds, options.methods
    swept = [method for method in methods if method in SWEPT] or methods
    rates = [rate for rate in options.learning_rates if rate != RATE]
    sweep = [Trial(method, seed, rate) for seed in seeds for rate in rates for method in swept]
    for_one_seed = len(rates) * len(swept)
    same_time = [method for method in methods if method in EQUAL_TIME] or methods
    at_rate = {
        later: [Trial(method, seed) for seed in seeds for method in methods if (method in LATER) == later]
        for later in (False, True)
    }
    return [
        *(at_rate[False] if RATE in options.learning_rates else []),
        *sweep[:for_one_seed],
        *(Trial(method, seed, equal_time=True) for seed in seeds for method in same_time if options.equal_time),
        *(at_rate[True] if RATE in options.learning_rates else []),
        *sweep[for_one_seed:],
    ]


def run_trials(bench: Bench, trials: Sequence[Trial]) -> int:
    """Run the trials that are not finished, and return how many failed."""

    def ready(trial: Trial) -> bool:
        needed = {Trial(trial.method, trial.seed).name, Trial(REFERENCE, trial.seed).name} if trial.equal_time else ()
        return all((bench.work / f"{name}.json").exists() for name in needed)

    def run(trial: Trial) -> None:
        fixed = for_equal_time(bench.work, trial) if trial.equal_time else trial
        try:
            once(bench.work / f"{trial.name}.json", lambda: run_trial(bench, fixed))
        except (TimeIsUp, TrialFailed):
            keep_evaluations(bench, fixed)
            raise
        student = bench.work / "students" / trial.name
        if student.exists():
            bench.own_answers.begin(trial.name, student)

    (bench.work / "students").mkdir(exist_ok=True)
    bench.own_answers.begin(PRUNED, bench.work / "student", delete=False)
    try:
        failed = bench.pool.run(trials, ready, run, lambda: write_results(bench))
        bench.own_answers.finish()
        return failed
    finally:
        bench.own_answers.cancel()
        write_results(bench)


def write_results(bench: Bench) -> None:
    """Write real_model.json: the finished trials, and those of other devices that the file has already."""
    file = bench.output / "real_model.json"
    old = json.loads(file.read_text()) if file.exists() else {"devices": {}, "runs": []}
    others = [run for run in old["runs"] if run["device"] != bench.device]
    finished = [
        json.loads(path.read_text()) | {"own_answers": bench.own_answers.figures(path.stem)}
        for path in bench.work.glob("*-*.json")
    ]
    stopped = [
        json.loads(path.read_text())
        for path in bench.work.glob("stopped/*.json")
        if not (bench.work / path.name).exists()
    ]
    order = list(METHODS)
    runs = sorted(
        [*finished, *stopped],
        key=lambda run: (order.index(run["method"]), run["learning_rate"], run["equal_time"], run["seed"]),
    )
    facts = {
        "versions": installed_versions(),
        "parallel": bench.pool.parallel,
        "settings": list(bench.settings),
        "own_answers_before": bench.own_answers.figures(PRUNED),
    }
    devices = {**old["devices"], bench.device: facts}
    file.write_text(json.dumps({"devices": devices, "runs": [*others, *runs]}, indent=1) + "\n")


def for_equal_time(work: Path, trial: Trial) -> Trial:
    """Return the trial with as many steps as fit into the time of the recipe's run with the same seed."""
    names = (Trial(trial.method, trial.seed, trial.learning_rate).name, Trial(REFERENCE, trial.seed).name)
    own, budget = (json.loads((work / f"{name}.json").read_text())["seconds_per_step"] for name in names)
    return dataclasses.replace(trial, steps=round(STEPS * budget / own))


def run_trial(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Train the pruned model and return the metrics of the evaluations. The run folder is deleted afterwards.

    `seconds_per_step` has no start and no evaluations. On a GPU it is the median time of a step; on a CPU the user time
    of the run times the share of its steps in the wall time.

    Raises TrialFailed and TimeIsUp.
    """
    work, folder = bench.work, bench.work / trial.name
    values = _placeholders(work, trial)
    settings = [
        f"student.path={work / 'student'}",
        f"teacher.path={work / TEACHER}",
        f"data.prompts=[{work / 'train.jsonl'}]",
        f"evaluation.data=[{work / 'heldout.jsonl'}]",
        f"evaluation.answers_dir={work / 'teacher_answers'}",
        f"evaluation.every={max(trial.steps // EVALUATIONS, 1)}",
        "evaluation.samples=0",
        f"loss.representation.pairs={work / 'student' / 'pairs.yaml'}",
        f"optimizer.lr={trial.learning_rate}",
        f"train.steps={trial.steps}",
        f"train.seed={trial.seed}",
        f"train.run_dir={folder}",
        "checkpoint.export_dtype=fp32",
        *(setting.format(**values) for setting in METHODS[trial.method]),
        *bench.settings,
    ]
    shutil.rmtree(folder, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if bench.pool.parallel > 1:
        environment |= {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_oprd", "train", "--config", str(RECIPE), *settings]
    log = work / "logs" / f"{trial.name}.txt"
    log.parent.mkdir(exist_ok=True)
    user_seconds, seconds = bench.pool.run_process(command, environment, log)
    measured = _measured(folder)
    step_seconds = measured["by_step"]["time/step"]
    if bench.device == "CPU":
        per_step = user_seconds * statistics.mean(step_seconds) / seconds
    else:
        per_step = statistics.median(step_seconds[WARM_UP_STEPS:] or step_seconds)
    (folder / "hf").rename(work / "students" / trial.name)
    shutil.rmtree(folder)
    figures = {"seconds": seconds, "cpu_seconds": user_seconds, "seconds_per_step": per_step}
    return described(bench, trial) | figures | measured


def keep_evaluations(bench: Bench, trial: Trial) -> None:
    """Write the evaluations of a trial that ended early, if there are any besides the one before the training."""
    folder = bench.work / trial.name
    if (folder / "metrics.jsonl").exists() and (folder / "evaluations.jsonl").exists():
        measured = _measured(folder)
        step = measured["evaluations"][-1]["step"]
        if step > 0:
            (bench.work / "stopped").mkdir(exist_ok=True)
            record = described(bench, trial) | {"stopped_after": step} | measured
            (bench.work / "stopped" / f"{trial.name}.json").write_text(json.dumps(record) + "\n")
    shutil.rmtree(folder, ignore_errors=True)


def described(bench: Bench, trial: Trial) -> dict[str, Any]:
    """Return what the record of a trial says about its settings."""
    return dataclasses.asdict(trial) | {"device": bench.device}


def _measured(folder: Path) -> dict[str, Any]:
    """Return the evaluations of a run by step, and the losses and seconds of its steps."""
    steps, evaluations = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "evaluations")
    )
    by_step = {item["step"]: next(iter(item["data"].values())) for item in evaluations}
    kept = ("loss", "grad_norm", "rep/cosine", "output/reverse_kl", *(f"time/{part}" for part in PARTS))
    return {
        "before": by_step[0],
        "after": by_step[max(by_step)],
        "evaluations": [{"step": step, "perplexity": values["perplexity"]} for step, values in by_step.items()],
        "by_step": {name: [line.get(name) for line in steps] for name in kept if name in steps[-1]},
    }


def _placeholders(work: Path, trial: Trial) -> dict[str, str]:
    """Return the values of the names in braces in METHODS."""
    written = yaml.safe_load((work / "student" / "pairs.yaml").read_text())
    depth = max(teacher for _, teacher in written["pairs"])
    kept = [block for block in range(1, depth + 1) if block not in written["dropped"]]
    values = {
        "next_input_pairs": str([list(pair) for pair in pairs_of_kept_blocks(kept, depth, "next_input")]),
        "last_pair": str([[len(kept), depth]]),
    }
    if any("{teacher_rollouts}" in setting for setting in METHODS[trial.method]):
        values["teacher_rollouts"] = str(
            teacher_rollouts(
                work / f"teacher_rollouts-{trial.seed}.jsonl",
                work / TEACHER,
                work / "train.jsonl",
                number=trial.steps * PROMPTS_PER_STEP,
                seed=trial.seed,
                max_new_tokens=LONGEST_ANSWER,
            )
        )
    return values


if __name__ == "__main__":
    sys.exit(main())
