"""Measure the error of a teacher's hidden states in FP8 on the student's own answers, and the loss that it leaves.

torchrun -m megatron_oprd.fp8_error --config F [a.b=1 ...]
"""

from __future__ import annotations

import dataclasses

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser(
    "fp8-error",
    "Measure what precision.teacher_fp8 does to a teacher's states.",
    override="rollout.prompts_per_step=4",
    config="YAML file of a training run whose teacher is in FP8",
)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.data.prompts import PromptState
from megatron_oprd.data.sharding import split
from megatron_oprd.launch.assemble import build_models
from megatron_oprd.launch.inputs import Inputs, read_inputs
from megatron_oprd.launch.models import build_teacher
from megatron_oprd.launch.step_data import align, make_global_batch, next_prompts
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.runtime.files import explain_os_errors, write_json
from megatron_oprd.training.fp8_error import LayerError, measure_error
from megatron_oprd.training.global_batch import share_rollouts
from megatron_oprd.types import UserError

FILE = "fp8_error.json"


def main(arguments: list[str] | None = None) -> int:
    """Run the command: generate rollouts, run the teacher on them with and without FP8, print and write the errors."""
    options = PARSER.parse_args(arguments)
    inputs = read_inputs(measuring_config(load_config(options.config, options.overrides)))
    errors = measure(inputs)

    def write() -> None:
        rows = [{"student_layer": layer, **dataclasses.asdict(error)} for layer, error in errors.items()]
        total = sum(error.floor for error in errors.values())
        with explain_os_errors(inputs.run_dir):
            inputs.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(inputs.run_dir / FILE, {"layers": rows, "loss_floor": total})
        _print(errors, total)
        print(f"written: {inputs.run_dir / FILE}", flush=True)

    on_rank_zero(write)
    return 0


def measuring_config(config: Config) -> Config:
    """Return the configuration of a training run with one step and one teacher in memory at a time.

    Raises UserError if no teacher runs in FP8 or no hidden states are compared.
    """
    value = config.precision.teacher_fp8
    if value in ("auto", "off"):
        raise UserError(f"precision.teacher_fp8={value}: there is nothing to measure; set it to compute or weights")
    if not config.loss.reads_layers:
        raise UserError("loss.representation.weight=0 compares no hidden states; there is no error of them to measure")
    changes = {
        "train": config.train.model_copy(update={"steps": 1}),
        "evaluation": config.evaluation.model_copy(update={"every": 0}),
        "teachers_in_memory": "one",
    }
    return config.model_copy(update=changes)


def measure(inputs: Inputs) -> dict[int, LayerError]:
    """Return the error of each compared layer by student layer, the same on every rank. Collective over the world."""
    models = build_models(inputs, identifies=False)
    topology = models.topology
    prompts, _ = next_prompts(inputs, PromptState())
    models.engine.sync_weights(0)
    local_rollouts = models.engine.generate(split(prompts, topology.replica_rank, topology.num_replicas), 0)
    global_batch = make_global_batch(inputs, share_rollouts(align(inputs, local_rollouts), topology))
    setup = inputs.setup
    exact_precision = dataclasses.replace(setup.precision, teacher=setup.precision.exact_teacher)
    exact = dataclasses.replace(inputs.model_inputs, setup=dataclasses.replace(setup, precision=exact_precision))
    exact_teachers = [
        build_teacher(exact, planned, teacher.topology)
        for planned, teacher in zip(setup.teachers.values(), models.teachers, strict=True)
    ]
    return measure_error(exact_teachers, models.teachers, global_batch, topology)


def _print(errors: dict[int, LayerError], total: float) -> None:
    columns = ("student layer", "teacher layer", "relative error", "loss floor")
    table = Table(*columns, title="The teacher in FP8 against itself in full", box=box.SIMPLE)
    for layer, error in errors.items():
        table.add_row(str(layer), str(error.teacher_layer), f"{error.relative:.4f}", f"{error.floor:.3e}")
    console = Console()
    console.print(table)
    console.print(f"loss of a student whose states equal the teacher's in full: {total:.3e}", highlight=False)


if __name__ == "__main__":
    run_command(main)
