"""Write the report page of a run again, or a page that compares several runs. The runs may be going on."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_oprd.report.run_files import check_is_run, read_run
from megatron_oprd.report.run_state import is_running
from megatron_oprd.report.write import write_comparison, write_report
from megatron_oprd.runtime.cli import ArgumentParser, run_command

PARSER = ArgumentParser(
    prog="megatron-oprd report",
    description="Write report.html of a run again, or one page that compares several runs.",
)
PARSER.add_argument("run", metavar="RUN", nargs="+", help="the run folder (train.run_dir); several are compared")
PARSER.add_argument("--to", metavar="FILE", default="comparison.html", help="the page of several runs (%(default)s)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = PARSER.parse_args(arguments)
    folders = list(dict.fromkeys(map(Path, options.run)))
    for folder in folders:
        check_is_run(folder)
    if len(folders) > 1:
        print(f"report: {write_comparison(folders, Path(options.to))}")
        return 0
    run = read_run(folders[0])
    print(f"report: {write_report(run.run_dir, is_running=is_running(run, time.time()))}")
    return 0


if __name__ == "__main__":
    run_command(main)
