"""Write report.html of a run folder again, from the files that it has so far. The run may be going on."""

from __future__ import annotations

from pathlib import Path

from megatron_oprd.commands.status import is_running
from megatron_oprd.report.write import write_report
from megatron_oprd.runtime.cli import ArgumentParser, run_command

PARSER = ArgumentParser(prog="megatron-oprd report", description="Write report.html of a run again.")
PARSER.add_argument("run", metavar="RUN", help="the run folder (train.run_dir)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    run_dir = Path(PARSER.parse_args(arguments).run)
    print(f"report: {write_report(run_dir, is_running=is_running(run_dir))}")
    return 0


if __name__ == "__main__":
    run_command(main)
