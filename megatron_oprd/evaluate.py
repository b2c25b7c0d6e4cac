"""Evaluation alone: the student of a configuration on `evaluation.data`.

torchrun -m megatron_oprd.evaluate --config F [a.b=1 ...]
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser("evaluate", "Evaluate the student of a configuration.", override="evaluation.samples=4")
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.checkpoint.weights import check_weights
from megatron_oprd.data.prompts import PromptSet
from megatron_oprd.data.tokenizer import check_tokenizer, load_tokenizer
from megatron_oprd.evaluation.grading import Sample
from megatron_oprd.evaluation.sampling import evaluate_over_ranks, write_samples
from megatron_oprd.evaluation.scores import score_by_source
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.assemble import build_and_load, make_evaluator, start_topology
from megatron_oprd.launch.inputs import read_evaluation_prompts
from megatron_oprd.launch.layouts import check_student_layout, world_size
from megatron_oprd.models.build import check_recompute
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.models.precision import plan_precision
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import check_layout
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.environment import find_machine
from megatron_oprd.runtime.files import check_writable, write_json


def main(arguments: list[str] | None = None) -> int:
    """The command: sample answers, grade them, print the scores, write `evaluation/` in the run folder."""
    options = PARSER.parse_args(arguments)
    config = load_config(options.config, options.overrides)
    check_writable(config.train.run_dir)
    folder = Path(config.train.run_dir) / "evaluation"  # not the run's own: that may be training meanwhile
    with guarded(config.watchdog, folder):
        evaluate_and_write(config, folder)
    return 0


def evaluate_and_write(config: Config, folder: Path) -> None:
    """The work of the command. Collective over the world."""
    samples, prompts = evaluate_model(config)
    scores = score_by_source(samples, config.evaluation.samples)

    def write() -> None:
        write_samples(folder / "samples.jsonl", 0, samples)
        write_json(folder / "scores.json", {"student": config.student.path, "data": scores})
        _print(scores, prompts.summary())
        print(f"samples: {folder / 'samples.jsonl'}", flush=True)

    on_rank_zero(write)


def evaluate_model(config: Config) -> tuple[list[Sample], PromptSet]:
    """Graded samples of the model at `student.path` on `evaluation.data`, on every rank, and the prompts read.

    Collective over the world. Raises UserError before a model is built.
    """
    spec = read_model_spec(config.student.path)
    check_layout(config.parallel, world_size())
    check_student_layout(config.parallel, spec)
    stages = even_stages(spec.num_layers, config.parallel.pipeline, config.parallel.virtual_pipeline or 1)
    check_recompute(config.recompute, stages)
    check_weights(config.student.path, spec)
    tokenizer = load_tokenizer(config.student.path)
    check_tokenizer(tokenizer, spec)
    prompts = read_evaluation_prompts(config, tokenizer)
    precision = plan_precision(config.precision, config.parallel, find_machine()).student
    progress.enter("loading")
    topology = start_topology(config, config.parallel)
    engine = make_evaluator(config, build_and_load(config, spec, topology, stages, precision), spec, topology)
    progress.enter("evaluation")
    return evaluate_over_ranks(engine, prompts.prompts, tokenizer, topology), prompts


def _print(scores: dict[str, dict[str, float]], summary: str) -> None:
    names = list(dict.fromkeys(name for metrics in scores.values() for name in metrics))
    table = Table("data", *names, title=f"Evaluation ({summary})")
    for source, metrics in scores.items():
        table.add_row(source, *(f"{metrics[name]:.4g}" if name in metrics else "" for name in names))
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
