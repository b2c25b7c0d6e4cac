#!/usr/bin/env python3
"""Run `megatron-oprd convert`, also from a clone that is not installed."""

import door  # noqa: F401  # isort: skip  # makes the package importable

from megatron_oprd.commands.convert import main
from megatron_oprd.runtime.cli import run_command

if __name__ == "__main__":
    run_command(main)
