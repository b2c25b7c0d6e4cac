"""Evaluate the student of a configuration on `evaluation.data`, without training.

torchrun -m megatron_oprd.evaluate --config F [a.b=1 ...]
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_oprd.config import load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser("evaluate", "Evaluate the student of a configuration.", override="evaluation.samples=4")
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.evaluation.grading import Sample
from megatron_oprd.evaluation.sampling import evaluate_over_ranks, write_samples
from megatron_oprd.evaluation.scores import score_by_source
from megatron_oprd.launch.assemble import make_evaluator
from megatron_oprd.launch.evaluation_inputs import EvaluationInputs, read_evaluation_inputs
from megatron_oprd.launch.models import build_student_stage, start_topology
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import write_json


def main(arguments: list[str] | None = None) -> int:
    """Run the command: sample answers, grade them, print the scores, write `evaluation/` in the run folder."""
    options = PARSER.parse_args(arguments)
    inputs = read_evaluation_inputs(load_config(options.config, options.overrides))
    folder = Path(inputs.config.train.run_dir) / "evaluation"  # training may write to the run folder meanwhile
    with guarded(inputs.config.watchdog, folder):
        evaluate_and_write(inputs, folder)
    return 0


def evaluate_and_write(inputs: EvaluationInputs, folder: Path) -> None:
    """Evaluate the student and write samples and scores to `folder`. Collective over the world."""
    config = inputs.config
    samples = evaluate_model(inputs)
    scores = score_by_source(samples, config.evaluation.samples)

    def write() -> None:
        write_samples(folder / "samples.jsonl", 0, samples)
        write_json(folder / "scores.json", {"student": config.student.path, "data": scores})
        _print(scores, inputs.prompts.evaluation_summary())
        print(f"samples: {folder / 'samples.jsonl'}", flush=True)

    on_rank_zero(write)


def evaluate_model(inputs: EvaluationInputs) -> list[Sample]:
    """Sample and grade answers of the model at `student.path`. Every rank returns all samples.

    Starts the process group. Collective over the world.
    """
    progress.enter("loading")
    config, setup = inputs.config, inputs.setup
    topology = start_topology(config, config.parallel)
    engine = make_evaluator(config, build_student_stage(config, setup, topology), setup.student, topology)
    progress.enter("evaluation")
    return evaluate_over_ranks(engine, inputs.prompts.prompts, inputs.tokenizer, topology)


def _print(scores: dict[str, dict[str, float]], summary: str) -> None:
    names = list(dict.fromkeys(name for metrics in scores.values() for name in metrics))
    table = Table("data", *names, title=f"Evaluation ({summary})")
    for source, metrics in scores.items():
        table.add_row(source, *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names))
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
