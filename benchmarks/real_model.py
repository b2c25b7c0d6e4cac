"""The demo's real model, healed by every method from the same start: perplexity by step and by second of CPU time.

    python benchmarks/real_model.py [--work DIR --output DIR --seeds 0 1 2 --methods hidden_states full_kl ...
                                     --learning-rates 1e-4 2e-4 ... --equal-time]
    python benchmarks/real_model.py --page-only    # the table and the plots again, from real_model.json

The models, the prompts and the recipe are those of `examples/run_oprd_qwen.sh demo=real_model`. The pruned model, the
held-out instructions and the teacher's answers to them are the same in all runs; a seed changes the order of the
prompts and the rollouts. `--equal-time` trains each method again for as many steps as fit into the CPU time of the
demo's recipe. Each finished run leaves a file in --work and is not run again, so an interrupted benchmark goes on.
Writes real_model.json with all finished runs and two plots into --output (docs/results) after each run, and prints the
table of docs/real_model.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from benchmarks.objectives import once
from benchmarks.pages import installed_versions
from benchmarks.real_model_page import plot_over_seconds, plot_over_steps, table
from examples.demo.run import RECIPES
from examples.real_model.pipeline import TEACHER, prepare
from megatron_oprd.config import DataConfig
from megatron_oprd.data.prompts import PromptState, load_prompts, take
from megatron_oprd.data.tokenizer import load_tokenizer
from megatron_oprd.models.layer_pairs import pairs_of_kept_blocks

ROOT = Path(__file__).resolve().parents[1]
RECIPE = RECIPES["real_model"]
RECIPE_VALUES = yaml.safe_load(RECIPE.read_text())
STEPS, RATE = RECIPE_VALUES["train"]["steps"], float(RECIPE_VALUES["optimizer"]["lr"])
PROMPTS_PER_STEP = RECIPE_VALUES["rollout"]["prompts_per_step"]
LONGEST_ANSWER = RECIPE_VALUES["rollout"]["max_new_tokens"]
REFERENCE = "both"  # the demo's recipe
EVALUATIONS = 3  # besides the one before the training
HIDDEN = ("loss.representation.weight=1", "loss.output.objective=none")
ALONE = "loss.representation.weight=0"
# Names in braces are values that `_placeholders` returns.
METHODS: dict[str, tuple[str, ...]] = {
    REFERENCE: (),
    "hidden_states": HIDDEN,
    "hidden_next_input": (*HIDDEN, "loss.representation.pairs={next_input_pairs}"),
    "hidden_proportional": (*HIDDEN, "loss.representation.pairs=null"),
    "hidden_last": (*HIDDEN, "loss.representation.pairs={last_pair}"),
    "hidden_off_policy": (*HIDDEN, "rollout.engine=replay", "rollout.path={teacher_rollouts}"),
    "full_kl": (ALONE,),
    "top16": (ALONE, "loss.output.objective=topk_surrogate", "loss.output.k=16"),
}


@dataclass(frozen=True)
class Trial:
    """A training run of this benchmark."""

    method: str
    seed: int
    learning_rate: float = RATE
    steps: int = STEPS

    @property
    def name(self) -> str:
        """Return the name of the run's folder; values of the recipe are left out."""
        rate = "" if self.learning_rate == RATE else f"-lr{self.learning_rate:g}"
        return f"{self.method}-{self.seed}{rate}" + ("" if self.steps == STEPS else f"-steps{self.steps}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "real_model", help="models and finished runs")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--equal-time", action="store_true", help="also run each method for the recipe's CPU time")
    parser.add_argument("--page-only", action="store_true", help="run nothing")
    options = parser.parse_args()
    file = options.output / "real_model.json"
    if not options.page_only:
        options.work.mkdir(parents=True, exist_ok=True)
        prepare(options.work / TEACHER, options.work)
        trials = [
            Trial(method, seed, rate)
            for seed in options.seeds
            for rate in options.learning_rates
            for method in options.methods
        ]
        for trial in trials:
            measure(options.work, file, trial)
        if options.equal_time:
            for trial in trials:
                measure(options.work, file, for_equal_time(options.work, trial))
    runs = json.loads(file.read_text())["runs"]
    (options.output / "real_model-steps.svg").write_text(plot_over_steps(runs))
    (options.output / "real_model-seconds.svg").write_text(plot_over_seconds(runs))
    print("\n".join(table(runs)))


def measure(work: Path, file: Path, trial: Trial) -> dict[str, Any]:
    """Run a trial unless it is finished, write `file` with all finished runs, and return the trial's figures."""
    figures = once(work / f"{trial.name}.json", partial(run_trial, work, trial))
    finished = [json.loads(path.read_text()) for path in work.glob("*-*.json")]
    order = list(METHODS)
    runs = sorted(finished, key=lambda run: (order.index(run["method"]), run["learning_rate"], run["seed"]))
    file.write_text(json.dumps({"versions": installed_versions(), "runs": runs}, indent=1) + "\n")
    return figures


def for_equal_time(work: Path, trial: Trial) -> Trial:
    """Return the trial with as many steps as fit into the CPU time of the recipe's run with the same seed."""
    names = (trial.name, Trial(REFERENCE, trial.seed).name)
    own, budget = (json.loads((work / f"{name}.json").read_text())["cpu_seconds_per_step"] for name in names)
    return Trial(trial.method, trial.seed, trial.learning_rate, round(STEPS * budget / own))


def run_trial(work: Path, trial: Trial) -> dict[str, Any]:
    """Train the pruned model and return the metrics of the evaluations. The run folder is deleted afterwards.

    `cpu_seconds` is the user time of the run. `cpu_seconds_per_step` leaves out start and evaluations, as their share
    of the wall time.
    """
    folder = work / trial.name
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
        "checkpoint.export_hf=false",
        *(setting.format(**values) for setting in METHODS[trial.method]),
    ]
    shutil.rmtree(folder, ignore_errors=True)
    begin, before = time.perf_counter(), _user_seconds()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    with (work / "log.txt").open("a") as log:
        command = [sys.executable, "-m", "megatron_oprd", "train", "--config", str(RECIPE), *settings]
        subprocess.run(command, check=True, env=environment, stdout=log)
    user_seconds, seconds = _user_seconds() - before, time.perf_counter() - begin
    measured = _measured(folder)
    figures = {
        "method": trial.method,
        "seed": trial.seed,
        "learning_rate": trial.learning_rate,
        "steps": trial.steps,
        "cpu_seconds": user_seconds,
        "cpu_seconds_per_step": user_seconds * statistics.mean(measured["by_step"]["time/step"]) / seconds,
        **measured,
    }
    shutil.rmtree(folder)
    return figures


def _measured(folder: Path) -> dict[str, Any]:
    """Return the evaluations of a run by step, and the losses and seconds of its steps."""
    steps, evaluations = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("metrics", "evaluations")
    )
    by_step = {item["step"]: next(iter(item["data"].values())) for item in evaluations}
    kept = ("loss", "grad_norm", "rep/cosine", "output/reverse_kl", "time/step")
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
        values["teacher_rollouts"] = str(teacher_rollouts(work, trial))
    return values


def teacher_rollouts(work: Path, trial: Trial) -> Path:
    """Return a replay file with one answer of the teacher to each prompt of a run, in the order of the run.

    The answers are sampled at temperature 1 with as many tokens as the student's, by transformers.
    """
    path = work / f"teacher_rollouts-{trial.seed}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    number = trial.steps * PROMPTS_PER_STEP
    if len(lines) < number:
        import torch
        import transformers

        tokenizer = load_tokenizer(work / TEACHER)
        prompts = load_prompts([str(work / "train.jsonl")], tokenizer, DataConfig()).prompts
        chosen, _ = take(prompts, PromptState(), number, seed=trial.seed, shuffle=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(work / TEACHER, dtype=torch.float32).eval()
        torch.manual_seed(trial.seed)
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        lines = []
        for prompt in chosen:
            ids = torch.tensor([prompt.prompt_ids])
            answer = model.generate(ids, max_new_tokens=LONGEST_ANSWER, **sampling)[0, ids.shape[1] :]
            lines.append(json.dumps({"prompt_ids": prompt.prompt_ids, "response_ids": answer.tolist()}))
        path.write_text("".join(f"{line}\n" for line in lines))
    return path


def _user_seconds() -> float:
    """Return the user time of all processes that this one has started and waited for."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime


if __name__ == "__main__":
    main()
