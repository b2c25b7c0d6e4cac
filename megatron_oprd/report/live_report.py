"""Write the report of a run again and again while the run goes on."""

from __future__ import annotations

import time
from pathlib import Path

from megatron_oprd.report.write import write_report

SECONDS = 30.0  # at least between two reports
COST = 50.0  # a report that took t seconds is not written again within COST * t seconds: at most 2 % of the time


class LiveReport:
    """Keeps `report.html` of a run folder up to date. One rank calls the methods. A failure never ends the run."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._next = 0.0  # time of the next report
        self._failed = False

    def update(self, *, now: bool = False) -> None:
        """Write the report if it is due. `now`: write it in any case."""
        began = time.monotonic()
        if not now and began < self._next:
            return
        try:
            write_report(self._run_dir, is_running=True)
        except Exception as error:  # a report is not worth a run
            if not self._failed:
                print(f"warning: report.html is not updated: {error}", flush=True)
            self._failed = True
        ended = time.monotonic()
        self._next = ended + max(SECONDS, COST * (ended - began))
