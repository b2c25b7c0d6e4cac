"""Fit the bridge between a student and a teacher of another architecture (stage 1 of OPRD-Bridge).

torchrun -m megatron_oprd.bridge.fit --config F [a.b=1 ...]
"""

from __future__ import annotations

from megatron_oprd.config import load_config
from megatron_oprd.runtime.cli import check_command_line, command_parser, run_command

PARSER = command_parser(
    "fit-bridge",
    "Fit the bridge between a student and an unlike teacher.",
    override="bridge.ranks=[4,8]",
    config="YAML file; `bridge`, `rollout`, `data` and `loss.representation` are read",
)
if __name__ == "__main__":
    check_command_line(PARSER)  # a mistake is reported before the slow imports

import megatron_oprd.runtime.platform  # noqa: F401  # isort: skip  # first, to filter warnings of Megatron-Core
from megatron_oprd.bridge.fitting.procedure import fit_bridge
from megatron_oprd.bridge.fitting.setup import FitRun, check_inputs, fitting_config
from megatron_oprd.launch.assemble import build_models
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.runtime import progress


def main(arguments: list[str] | None = None) -> int:
    """Generate the student's answers, fit the maps on both models' states, and write one bridge for each rank."""
    options = PARSER.parse_args(arguments)
    inputs = read_inputs(fitting_config(load_config(options.config, options.overrides)), fitting=True)
    check_inputs(inputs)
    with guarded(inputs.config.watchdog, inputs.run_dir, alone=True):
        progress.enter("loading")
        fit_bridge(FitRun(inputs, build_models(inputs)))
    return 0


if __name__ == "__main__":
    run_command(main)
