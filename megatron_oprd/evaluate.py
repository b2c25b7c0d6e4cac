"""Evaluate a model on `evaluation.data`, without training.

torchrun -m megatron_oprd.evaluate [MODEL] [--config F] [a.b=1 ...]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser(
    "evaluate",
    "Evaluate a model: `evaluate MODEL evaluation.data=FILE`, or the student of a configuration. MODEL is a folder and "
    "stands for student.path=MODEL. The student is measured on the teacher's answers with teacher.path=FOLDER.",
    override="evaluation.samples=4",
)
PARSER.usage = "megatron-oprd evaluate [-h] [MODEL] [--config FILE] [key=value ...]"


def read_configuration(options: argparse.Namespace) -> Config:
    """Return the configuration of the command; the first argument without `=` is MODEL. Raises UserError."""
    overrides = list(options.overrides)
    model = next((place for place, argument in enumerate(overrides) if "=" not in argument), None)
    if model is not None:
        overrides[model] = f"student.path={json.dumps(overrides[model])}"
    return load_config(options.config, overrides, for_evaluation=True)


if __name__ == "__main__":
    check_command_line(PARSER, read_configuration)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.checkpoint.weights import content_hash
from megatron_oprd.evaluation.grading import Sample
from megatron_oprd.evaluation.measure import MeasuredModels, measure_by_source
from megatron_oprd.evaluation.sampling import evaluate_over_ranks, write_samples
from megatron_oprd.evaluation.scores import Scores, merge_scores, score_by_source
from megatron_oprd.launch.assemble import make_evaluator
from megatron_oprd.launch.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from megatron_oprd.launch.models import Topologies, build_student_stage, build_teachers, load_heads, start_topologies
from megatron_oprd.launch.teacher_answers import AnswerRequest, teacher_answers
from megatron_oprd.models.model import Stage
from megatron_oprd.models.projection import student_maps
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import write_json
from megatron_oprd.types import Rollout


@dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation."""

    samples: list[Sample]  # graded answers of the student
    on_answers: Scores  # metrics on the teacher's answers; empty: the teacher has not answered


def main(arguments: list[str] | None = None) -> int:
    """Run the command: measure, sample and grade, print the scores, write `evaluation/` in the run folder."""
    inputs = read_evaluation_inputs(read_configuration(PARSER.parse_args(arguments)))
    folder = Path(inputs.config.train.run_dir) / "evaluation"  # training may write to the run folder meanwhile
    with guarded(inputs.config.watchdog, folder):
        evaluate_and_write(inputs, folder)
    return 0


def evaluate_and_write(inputs: EvaluationInputs, folder: Path) -> None:
    """Evaluate the student and write samples and scores to `folder`. Collective over the world."""
    config = inputs.config
    found = evaluate_model(inputs)
    scores = merge_scores(found.on_answers, score_by_source(found.samples, config.evaluation.samples))
    models = {"student": config.student.path}
    if found.on_answers and config.teacher is not None:
        models["teacher"] = config.teacher.path

    def write() -> None:
        write_samples(folder / "samples.jsonl", 0, found.samples)
        write_json(folder / "scores.json", {**models, "data": scores})
        _print(scores, inputs.prompts.evaluation_summary())
        print(
            f"samples: {folder / 'samples.jsonl'}" if found.samples else f"scores: {folder / 'scores.json'}", flush=True
        )

    on_rank_zero(write)


def evaluate_model(inputs: EvaluationInputs) -> Evaluation:
    """Measure the model at `student.path` on the teacher's answers, and sample and grade answers of its own.

    Every rank returns all results. Starts the process group. Collective over the world.
    """
    progress.enter("loading")
    config, setup = inputs.config, inputs.setup
    topologies = start_topologies(config, setup)
    topology, prompts = topologies.student, inputs.prompts.prompts
    answers: tuple[Rollout, ...] = ()
    if setup.teachers:
        (teacher,) = setup.teachers.values()
        digest = on_rank_zero(lambda: content_hash(teacher.config.path))
        request = AnswerRequest(config, setup, inputs.tokenizer, prompts, inputs.model_inputs.vocab_size, digest)
        answers = teacher_answers(request, topologies.teachers[0])
        progress.enter("loading")
    stage = build_student_stage(config, setup, topology)
    models = _measured_models(inputs, stage, topologies) if setup.teachers else None
    progress.enter("evaluation")
    on_answers = measure_by_source(models, answers) if models is not None else {}
    samples = []
    if config.evaluation.samples:
        engine = make_evaluator(config, stage, setup.student, topology)
        samples = evaluate_over_ranks(engine, prompts, inputs.tokenizer, topology)
    return Evaluation(samples, on_answers)


def _measured_models(inputs: EvaluationInputs, stage: Stage, topologies: Topologies) -> MeasuredModels:
    config, setup, topology, model_inputs = inputs.config, inputs.setup, topologies.student, inputs.model_inputs
    return MeasuredModels(
        stage,
        setup.student,
        topology,
        config.batch,
        setup.precision.pad_tokens,
        build_teachers(model_inputs, topologies)[0],
        lambda: load_heads(model_inputs, stage, topology),
        config.loss.representation if config.loss.reads_layers else None,
        student_maps(model_inputs.bridge, topology.device, trained=False),
    )


def _print(scores: Scores, summary: str) -> None:
    """Print a row for each metric and a column for each data source, below the numbers of prompts."""
    print(f"evaluated {summary}")
    table = Table("", *scores)
    graded = [any(name.startswith("avg@") for name in metrics) for metrics in scores.values()]
    if not all(graded):
        table.add_row("right answers", *("" if one else "not graded" for one in graded))
    for name in dict.fromkeys(name for metrics in scores.values() for name in metrics if "/layer_" not in name):
        table.add_row(name, *(f"{metrics[name]:.4g}" if name in metrics else "" for metrics in scores.values()))
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
