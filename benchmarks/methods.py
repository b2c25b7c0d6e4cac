"""The methods of docs/methods.md on tiny models, several seeds each: docs/results/methods.md.

    python benchmarks/methods.py [--work DIR --output DIR --seeds 5 --parallel 15 --minutes 4 --only NAME ...]
    python benchmarks/methods.py --page-only    # the page again, from methods.json

Each seed has pairs of models of its own (method_pairs.py), made when they are missing. Each trial trains a student in a
process of its own with one thread and measures it on held-out problems; --parallel trials run at a time, the most
important ones first. After --minutes all that still runs is ended. Finished pairs and trials stay in --work and are not
made again. Changed code needs a new --work. Writes methods.json and methods.md into --output (docs/results).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import examples.demo.pipeline  # noqa: F401  # before the forks, so that no process imports it again
from benchmarks.method_pairs import (
    ANSWER_TOKENS,
    BRIDGE_RANK,
    DIFFERENCE,
    SOLVED_PROMPT,
    SUM,
    make,
    share_right_by_token,
)
from benchmarks.methods_page import markdown
from benchmarks.pages import installed_versions
from examples.demo.run import RECIPES
from megatron_oprd import train

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"unlike": 100, "same": 60, "two": 60, "self": 60, "chain": 40}  # by pair
EVALUATIONS, LEARNING_RATE = 4, 3e-3
ALONE = "loss.representation.weight=0"
FULL_KL = "loss.output.objective=full_kl"
NO_SCHEDULE = "loss.schedule=null"
NO_BRIDGE = "loss.representation.bridge=null"
MAP = (NO_BRIDGE, "loss.representation.layers=last", "loss.representation.weight=1000")
CLOSED_FORM = ("loss.representation.map.kind=linear", "loss.representation.map.init=closed_form")
BY_TOKEN = "loss.representation.aggregation=token_mean"
JSD = (ALONE, FULL_KL, "loss.output.direction=jsd")
FLOW = "loss.flow.weight=0.05"
BASE_OUTPUT = "teacher.base.space=output"
EMA, LIVE = "teacher.ema=0.95", "teacher.ema=0"
GEOMETRY = "loss.flow={weight: 1, layers: last, direction: 0, geometry: 1, adjacent: 0}"
SAMPLED = (ALONE, "loss.output.objective=sampled", "optimizer.lr=1e-3")


@dataclass(frozen=True)
class Method:
    """A row of a table: a pair and the keys that differ from the demo's recipe."""

    experiment: str
    name: str
    pair: str
    settings: tuple[str, ...]
    extra: bool = False  # runs after all that are not


@dataclass(frozen=True)
class Trial:
    """A training run: a method and a seed."""

    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.experiment}-{self.method.name}-{self.seed}"


def fade(steps: int) -> str:
    return f"loss.schedule={{representation: [[0, 1.0], [{steps}, 0.0]], output: [[0, 0.0], [{steps}, 1.0]]}}"


def extrapolate(factor: float, base: str = "{pair}/student") -> tuple[str, ...]:
    return (
        "teacher.path={pair}/weak",
        f"teacher.base.path={base}",
        f"teacher.base.extrapolate={factor}",
        f"loss.representation.weight={1 / factor**2:.4f}",
    )


def tokens(positions: str, prompts: int, *settings: str) -> tuple[str, ...]:
    return (f"loss.representation.positions={positions}", f"rollout.prompts_per_step={prompts}", *settings)


METHODS = (
    Method("unlike", "full_kl", "unlike", (ALONE, NO_BRIDGE, FULL_KL, NO_SCHEDULE)),
    Method("unlike", "fade", "unlike", (FULL_KL, fade(10))),
    Method("unlike", "bridge", "unlike", ("loss.output.objective=none", NO_SCHEDULE)),
    Method("unlike", "fade_map", "unlike", (*MAP, BY_TOKEN, "loss.representation.map.kind=mlp", FULL_KL, fade(10))),
    Method("unlike", "both", "unlike", (FULL_KL, NO_SCHEDULE)),
    Method("positions", "all", "chain", tokens("all", 16)),
    Method("positions", "first", "chain", tokens("first_k", 60, "loss.representation.k=8", "rollout.horizon=auto")),
    Method("positions", "last", "chain", tokens("last_k", 60, "loss.representation.k=8")),
    Method("positions", "growing", "chain", tokens("all", 25, "rollout.horizon={start: 9, grow: 7, every: 10}")),
    Method("extrapolated", "plain", "same", ("teacher.path={pair}/weak",)),
    Method("extrapolated", "lambda_1.25", "same", extrapolate(1.25)),
    Method("extrapolated", "lambda_1.5", "same", extrapolate(1.5)),
    Method("layers", "plain", "same", ()),
    Method("layers", "l2", "same", ("loss.representation.normalize=l2",)),
    Method("layers", "inverse_square", "same", ("loss.representation.layer_weights=inverse_square",)),
    Method("teachers", "mixed", "two", ()),
    Method("teachers", "grouped", "two", ("data.group_by_teacher=true",)),
    Method("self", "jsd", "self", JSD),
    Method("self", "jsd_flow", "self", (*JSD, FLOW)),
    Method("self", "hidden", "self", ()),
    Method("self", "jsd_ema", "self", (*JSD, EMA)),
    Method("self", "jsd_flow_ema", "self", (*JSD, FLOW, EMA)),
    Method("self", "hidden_ema", "self", (EMA,)),
    Method("self", "jsd_live", "self", (*JSD, LIVE)),
    Method("self", "hidden_live", "self", (LIVE,)),
    Method("output", "full_kl", "same", (ALONE, FULL_KL)),
    Method("output", "skew_reverse", "same", (ALONE, FULL_KL, "loss.output.direction=skew_reverse")),
    Method("output", "sampled", "same", SAMPLED),
    Method("output", "gated", "same", (*SAMPLED, "loss.output.forward_above_entropy=0.8", "loss.output.k=4")),
    Method("unlike", "switch", "unlike", (FULL_KL, fade(10).replace("[0,", "[9,")), extra=True),
    Method("teachers", "full_kl_mixed", "two", (ALONE, FULL_KL), extra=True),
    Method("teachers", "full_kl_grouped", "two", (ALONE, FULL_KL, "data.group_by_teacher=true"), extra=True),
    Method("extrapolated", "other_base", "same", extrapolate(1.25, "{next_pair}/student"), extra=True),
    Method("extrapolated", "lambda_0.75", "same", extrapolate(0.75), extra=True),
    Method("extrapolated", "full_kl", "same", ("teacher.path={pair}/weak", ALONE, FULL_KL), extra=True),
    Method("extrapolated", "full_kl_1.25", "same", (*extrapolate(1.25), ALONE, FULL_KL, BASE_OUTPUT), extra=True),
    Method("positions", "all_60", "chain", tokens("all", 60), extra=True),
    Method("output", "skew_forward", "same", (ALONE, FULL_KL, "loss.output.direction=skew_forward"), extra=True),
    Method("output", "forward", "same", (ALONE, FULL_KL, "loss.output.direction=forward"), extra=True),
    Method("output", "adaptive", "same", (ALONE, FULL_KL, "loss.output.direction=adaptive"), extra=True),
    Method("output", "importance", "same", (*SAMPLED, "loss.output.importance=0.5"), extra=True),
    Method("unlike", "fade_matrix", "unlike", (*MAP, BY_TOKEN, *CLOSED_FORM, FULL_KL, fade(10)), extra=True),
    Method("unlike", "fade_20", "unlike", (FULL_KL, fade(20)), extra=True),
    Method("unlike", "fade_40", "unlike", (FULL_KL, fade(40)), extra=True),
    Method(
        "unlike", "flow", "unlike", (ALONE, NO_BRIDGE, NO_SCHEDULE, "loss.output.objective=none", GEOMETRY), extra=True
    ),
    Method("unlike", "full_kl_flow", "unlike", (ALONE, NO_BRIDGE, NO_SCHEDULE, FULL_KL, GEOMETRY), extra=True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "methods", help="pairs and finished trials")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parallel", type=int, default=1, help="trials that run at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end what still runs after this time")
    parser.add_argument("--steps", type=int, default=max(STEPS.values()), help="of a trial, at most")
    parser.add_argument("--only", nargs="+", choices=sorted({method.experiment for method in METHODS}))
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "methods.json"
    if not options.page_only:
        torch.set_num_threads(1)
        file.write_text(json.dumps(measure(options), indent=1) + "\n")
    (options.output / "methods.md").write_text(markdown(json.loads(file.read_text())))
    print(options.output / "methods.md")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the trials that have no result yet. Return the results of all that have one, and what is missing."""
    options.work.mkdir(parents=True, exist_ok=True)
    chosen = [method for method in METHODS if options.only is None or method.experiment in options.only]
    trials = [
        Trial(method, seed)
        for extra in (False, True)
        for method in chosen
        if method.extra == extra
        for seed in range(options.seeds)
    ]
    run_all(options.work, trials, options)
    results = [json.loads(file.read_text()) for trial in trials if (file := result_of(options.work, trial)).exists()]
    return {
        "versions": installed_versions(),
        "steps": STEPS,
        "seeds": options.seeds,
        "settings": {f"{method.experiment}/{method.name}": method.settings for method in chosen},
        "missing": [trial.name for trial in trials if not result_of(options.work, trial).exists()],
        "trials": results,
    }


def run_all(work: Path, trials: list[Trial], options: argparse.Namespace) -> None:
    """Run pairs and trials in processes of their own, in order, as soon as their inputs exist, until the time is up."""
    deadline = time.monotonic() + 60 * options.minutes
    waiting: list[Trial | tuple[str, int]] = [
        *dict.fromkeys((trial.method.pair, trial.seed) for trial in trials if not pair_of(work, trial).exists()),
        *(trial for trial in trials if not result_of(work, trial).exists()),
    ]
    running: list[multiprocessing.process.BaseProcess] = []
    context = multiprocessing.get_context("fork")
    while (waiting or running) and time.monotonic() < deadline:
        running = [process for process in running if process.is_alive()]
        ready = next((job for job in waiting if not isinstance(job, Trial) or inputs_exist(work, job)), None)
        if ready is None and not running:
            break  # the pairs of all remaining trials failed
        if ready is None or len(running) == options.parallel:
            time.sleep(0.1)
            continue
        waiting.remove(ready)
        process = context.Process(target=run_job, args=(work, ready, options.steps))
        process.start()
        running.append(process)
    for process in running:
        process.kill()
        process.join()


def run_job(work: Path, job: Trial | tuple[str, int], steps: int) -> None:
    """Make a pair or run a trial; the output goes into a file beside the result."""
    name = job.name if isinstance(job, Trial) else f"{job[0]}-{job[1]}"
    with (work / f"{name}.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        begin = time.process_time()
        if isinstance(job, Trial):
            result = run_trial(work, job, steps) | {"cpu_seconds": time.process_time() - begin}
            fresh = result_of(work, job).with_suffix(".new")
            fresh.write_text(json.dumps(result) + "\n")
            fresh.rename(result_of(work, job))
        else:
            make(*job, work / name)
    print(f"{name}: {time.process_time() - begin:.0f} CPU seconds", flush=True)


def run_trial(work: Path, trial: Trial, steps: int) -> dict[str, Any]:
    """Train a student, and return its accuracies during training and the tokens that the loss compared."""
    pair, run_dir = pair_of(work, trial), work / trial.name
    shutil.rmtree(run_dir, ignore_errors=True)
    chain = trial.method.pair == "chain"
    steps = min(steps, STEPS[trial.method.pair])
    train.main(["--config", str(recipe_of(trial)), *arguments(work, trial, steps), f"checkpoint.export_hf={chain}"])
    metrics, evaluations = (
        [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    )
    if len(metrics) < steps:
        raise RuntimeError(f"{trial.name} was ended after {len(metrics)} of {steps} steps")
    names = ("rep/num_tokens", "output/num_tokens")
    result = asdict(trial) | {
        "accuracy": [
            [one["step"], {source: scores["avg@1"] for source, scores in one["data"].items()}] for one in evaluations
        ],
        "compared_tokens": {name: sum(line.get(name, 0) for line in metrics) for name in names},
    }
    if chain:
        models = {"before": pair / "student", "after": run_dir / "hf", "teacher": pair / "teacher"}
        result["by_token"] = {name: share_right_by_token(pair, model) for name, model in models.items()}
    shutil.rmtree(run_dir)
    return result


def arguments(work: Path, trial: Trial, steps: int) -> list[str]:
    """Return the keys of a trial."""
    pair, kind = pair_of(work, trial), trial.method.pair
    teachers = {
        "two": ["teacher=null", *(f"teachers.{name}.path={pair / name}" for name in (SUM, DIFFERENCE))],
        "self": [f"teacher.path={pair / 'student'}", f"data.teacher_prompt_key={SOLVED_PROMPT}"],
        "unlike": [
            f"teacher.path={pair / 'teacher'}",
            f"loss.representation.bridge={pair / 'bridge' / f'rank_{BRIDGE_RANK}'}",
        ],
    }
    answer = ANSWER_TOKENS[kind] + 1
    return [
        *teachers.get(kind, [f"teacher.path={pair / 'teacher'}"]),
        f"student.path={pair / 'student'}",
        f"data.prompts=[{pair / 'train.jsonl'}]",
        f"evaluation.data=[{pair / 'heldout.jsonl'}]",
        f"evaluation.every={max(steps // EVALUATIONS, 1)}",
        f"evaluation.max_new_tokens={answer}",
        f"rollout.max_new_tokens={answer}",
        "batch.max_tokens_per_micro_batch=4096",
        f"train.steps={steps}",
        f"train.seed={trial.seed}",
        f"train.run_dir={work / trial.name}",
        "train.device=cpu",
        f"optimizer.lr={LEARNING_RATE}",
        "health.every=0",
        "checkpoint.every=0",
        "loss.output.metrics_every=0",
        *(one.replace("{pair}", str(pair)).replace("{next_pair}", str(next_of(pair))) for one in trial.method.settings),
    ]


def recipe_of(trial: Trial) -> Path:
    return RECIPES["cross_architecture" if trial.method.pair == "unlike" else "same_architecture"]


def pair_of(work: Path, trial: Trial) -> Path:
    return work / f"{trial.method.pair}-{trial.seed}"


def next_of(pair: Path) -> Path:
    """Return the pair of the next seed, whose models are no relatives; the next of the last one is the first."""
    kind, _, seed = pair.name.rpartition("-")
    following = pair.with_name(f"{kind}-{int(seed) + 1}")
    return following if following.exists() else pair.with_name(f"{kind}-0")


def result_of(work: Path, trial: Trial) -> Path:
    return work / f"{trial.name}.json"


def inputs_exist(work: Path, trial: Trial) -> bool:
    pair, settings = pair_of(work, trial), " ".join(trial.method.settings)
    return pair.exists() and ("{next_pair}" not in settings or next_of(pair).exists())


if __name__ == "__main__":
    main()
