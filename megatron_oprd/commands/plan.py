"""Print what a configuration would run and what it needs: the same as `train --dry-run`. No GPU and no weights needed.

megatron-oprd plan --config F [a.b=1 ...]
"""

from __future__ import annotations

from megatron_oprd.config import Config, load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser(
    "plan", "Print what training would run, and the memory and time that it needs.", override="parallel.tensor=2"
)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.planning.dry_run import describe_run
from megatron_oprd.planning.planned_run import PlannedRun


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = PARSER.parse_args(arguments)
    print_plan(load_config(options.config, options.overrides))
    return 0


def print_plan(config: Config) -> None:
    """Read the inputs that are available, and print the plan of a run. No communication."""
    inputs = read_inputs(config, dry_run=True)
    describe_run(PlannedRun(inputs.config, inputs.setup, inputs.lengths, inputs.bridge_rank), inputs.missing)


if __name__ == "__main__":
    run_command(main)
