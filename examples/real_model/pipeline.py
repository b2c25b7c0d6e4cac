"""The steps of the demo with a real model: get the model, prune it, distil the original into it, compare both."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from examples.demo.run import EXAMPLES, DemoRun, run_folder
from examples.real_model.instructions import write_instructions
from megatron_oprd import train
from megatron_oprd.evaluation.records import read_jsonl
from megatron_oprd.evaluation.scores import over_all_sources
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import start_process
from megatron_oprd.runtime import platform
from megatron_oprd.types import UserError

DROPPED_BLOCKS = 4  # of 30
TEACHER = "SmolLM2-135M-Instruct"
NUM_SHOWN = 3  # prompts whose answers are printed
# metric of an evaluation -> (name in the table, digits after the point)
ROWS = {
    "perplexity": ("perplexity of the teacher's answers", 2),
    "forward_kl": ("KL(teacher, student), nats per token", 3),
    "reverse_kl": ("KL(student, teacher), nats per token", 3),
    "argmax_agreement": ("most likely token in common", 3),
}


def run_real_model(run: DemoRun) -> None:
    """Run all steps and print what the student has learnt. Collective over the world."""
    begin = time.time()
    config = run.config
    start_process(platform.choose_device(config.train.device))
    folder = on_rank_zero(lambda: run_folder(run))
    given = next((item for item in run.overrides if item.startswith("teacher.path=")), None)
    teacher = Path(config.named_teachers[""].path) if given else folder.parent / TEACHER
    on_rank_zero(lambda: prepare(teacher, folder))
    paths = [
        f"student.path={folder / 'student'}",
        f"teacher.path={teacher}",
        f"data.prompts=[{folder / 'train.jsonl'}]",
        f"evaluation.data=[{folder / 'heldout.jsonl'}]",
        f"train.run_dir={folder}",
    ]
    if config.loss.representation.pairs is None:
        paths.append(f"loss.representation.pairs={folder / 'student' / 'pairs.yaml'}")
    train.main(["--config", str(run.recipe), *run.overrides, *paths])
    if not on_rank_zero((folder / "hf").exists):
        return  # a signal ended the training; the same command continues it
    answers = Path(config.evaluation.answers_dir or folder / "teacher_answers")
    on_rank_zero(lambda: print_results(folder, answers, time.time() - begin))


def prepare(teacher: Path, folder: Path) -> None:
    """Make the teacher, the prompts and the pruned student, as far as they are missing.

    Raises UserError if a step fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_instructions(folder)
    if not teacher.exists():
        _run_module("examples.real_model.make_smollm2", str(teacher))
    if not (folder / "student").exists():
        arguments = ["--drop", str(DROPPED_BLOCKS), "--prompts", str(folder / "train.jsonl")]
        _run_module("megatron_oprd", "prune", "--model", str(teacher), "--to", str(folder / "student"), *arguments)


def _run_module(module: str, *arguments: str) -> None:
    """Run a module in a process of its own, outside of this run's process group."""
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone["PYTHONPATH"] = os.pathsep.join([str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    code = subprocess.run([sys.executable, "-m", module, *arguments], env=alone, check=False).returncode
    if code != 0:
        raise UserError(f"{module} {' '.join(arguments[:1])} ended with exit code {code}; its message is above")


def print_results(folder: Path, teacher_answers: Path, seconds: float) -> None:
    """Print the metrics and some answers of student and teacher, before and after the training.

    Args:
        folder: the folder of the run.
        teacher_answers: the folder of the teacher's answers.
        seconds: the time that the demo took.
    """
    evaluations = read_jsonl(folder / "evaluations.jsonl")
    before, after = (over_all_sources(evaluation["data"]) for evaluation in (evaluations[0], evaluations[-1]))
    print_answers(folder, teacher_answers, evaluations[-1]["step"])
    table = Table("held-out instructions", "before", "after", "teacher")
    ideal = {"perplexity": before["teacher_perplexity"], "argmax_agreement": 1.0}
    for metric, (name, digits) in ROWS.items():
        values = (before[metric], after[metric], ideal.get(metric, 0.0))
        table.add_row(name, *(f"{value:.{digits}f}" for value in values))
    Console().print(table)
    gap, rest = (metrics["perplexity"] - metrics["teacher_perplexity"] for metrics in (before, after))
    print(f"gap to the teacher's perplexity: {gap:.2f} before, {rest:.2f} after ({1 - rest / gap:.0%} closed)")
    print(f"exported student: {folder / 'hf'}")
    print(f"the whole demo took {seconds:.0f} s")
    print(f"report: {folder / 'report.html'}", flush=True)


def print_answers(folder: Path, teacher_answers: Path, last_step: int) -> None:
    """Print the answers to the first held-out prompts: by the teacher, and by the student before and after.

    With `evaluation.samples=0` the student has given none, and nothing is printed.
    """
    teacher = {line["prompt"]: line for path in teacher_answers.glob("*.jsonl") for line in read_jsonl(path)}
    before, after = (read_jsonl(folder / "evaluations" / f"step_{step:07d}.jsonl") for step in (0, last_step))
    questions = [line["prompt"] for line in read_jsonl(folder / "heldout.jsonl")]
    for number in range(min(NUM_SHOWN, len(before), len(after))):
        print(f"\n{questions[number]}")
        answers = {"before": before[number], "after": after[number], "teacher": teacher[before[number]["prompt"]]}
        for name, answer in answers.items():
            text = " ".join(answer["response"].split())
            print(textwrap.fill(text, 110, initial_indent=f"  {name:<9}", subsequent_indent=" " * 11))
    print(flush=True)
