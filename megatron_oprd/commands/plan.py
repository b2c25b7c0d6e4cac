"""Print whether a configuration fits and what it would run: the same as `train --dry-run`. No GPU, no weights needed.

python -m megatron_oprd plan --config F [a.b=1 ...]
"""

from __future__ import annotations

import argparse
import os

from megatron_oprd.config import load_config, with_settings
from megatron_oprd.runtime.cli import add_plan_options, check_command_line, command_parser, run_command

PARSER = command_parser(
    "plan", "Print whether training fits into memory, what it would run, and its time.", override="parallel.tensor=2"
)
add_plan_options(PARSER)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.planning.dry_run import describe_run
from megatron_oprd.planning.plan_device import named_gpu, plan_device


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    print_plan(PARSER.parse_args(arguments))
    return 0


def print_plan(options: argparse.Namespace) -> None:
    """Read the inputs that are available, and print the plan of a run. No communication.

    `options`: those of `command_parser` and of `add_plan_options`.
    """
    config = load_config(options.config, options.overrides)
    gpu, why = named_gpu(options.device, config)
    if gpu is not None and config.precision.dtype == "auto":
        config = with_settings(config, {"precision.dtype": "bf16"})
    inputs = read_inputs(config, dry_run=True, choose_later=True)
    if os.environ.get("RANK", "0") == "0":
        describe_run(inputs, plan_device(gpu, why, inputs.setup, inputs.config), details=options.details)


if __name__ == "__main__":
    run_command(main)
