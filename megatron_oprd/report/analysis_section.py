"""The section of a report with what `megatron-oprd analyse` left in the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_oprd.evaluation.records import as_float, get, read_text
from megatron_oprd.report.analysis_data import line_figures, map_figures
from megatron_oprd.report.heat_map import heat_map, value_limits
from megatron_oprd.report.line_chart import line_chart
from megatron_oprd.report.page import number, section, table

GRADIENT_WORDS = (
    "noise: rollouts in a batch whose mean gradient is as long as its error; variance: of the gradient of a single "
    "rollout, summed over all parameters; seconds: of one gradient of the whole batch."
)


def analysis_section(run_dir: Path) -> str:
    """Return HTML from `analysis/analysis.json` of a run, or an empty string if the file is missing or damaged."""
    try:
        found = json.loads(read_text(run_dir / "analysis" / "analysis.json"))
        maps = map_figures(found)
        limits = value_limits([one.cells for one in maps])  # the maps before and after share their colours
        charts = [
            *(line_chart(one.title, one.lines, x_label=one.x_label, smooth=False) for one in line_figures(found)),
            *(heat_map(one.title, one.cells, limits) for one in maps),
        ]
        content = f'<div class="grid">{"".join(charts)}</div>{_gradients(found)}'
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    size = f"{number(found.get('rollouts'))} rollouts, {number(found.get('tokens'))} compared tokens."
    return section("Analysis", content, size)


def _gradients(found: Mapping[str, Any]) -> str:
    """Return the table of the objectives: variance of their gradients, and their cost."""
    rows: list[list[object]] = []
    for item in found["gradients"]:
        cost = get(item, "cost")
        seconds = (number(round(as_float(get(cost, f"{part}_seconds")), 4)) for part in ("teacher", "student"))
        mebibytes = number(round(as_float(get(cost, "target_bytes")) / 2**20, 2))
        facts = (number(get(item, name)) for name in ("noise", "variance", "signal"))
        rows.append([item.get("objective"), *facts, *seconds, mebibytes])
    if not rows:
        return ""
    head = ["objective", "noise", "variance", "signal", "teacher s", "student s", "targets MiB"]
    note = f'<p class="muted">{GRADIENT_WORDS}</p>'
    return f"<h3>Gradients of the same rollouts</h3>{table(head, rows)}{note}"
