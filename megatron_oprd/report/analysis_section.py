"""The section of a report with the figures and tables that `megatron-oprd analyse` left in the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_oprd.evaluation.records import as_float, get, read_text
from megatron_oprd.report.page import number, section, table

# Files that `megatron_oprd/analysis/figures.py` draws, in the order of the page.
FIGURES = (
    "cosine.svg",
    "error.svg",
    "positions-before.svg",
    "positions-after.svg",
    "rank.svg",
    "drift.svg",
    "gradients.svg",
)
GRADIENT_WORDS = (
    "noise: rollouts in a batch whose mean gradient is as long as its error; variance: of the gradient of a single "
    "rollout, summed over all parameters; seconds: of one gradient of the whole batch."
)


def analysis_section(run_dir: Path) -> str:
    """Return HTML from the folder `analysis/` of a run, or an empty string without a readable analysis.json."""
    folder = run_dir / "analysis"
    try:
        found = json.loads(read_text(folder / "analysis.json"))
    except ValueError:
        return ""
    if not isinstance(found, dict):
        return ""
    size = f"{number(found.get('rollouts'))} rollouts, {number(found.get('tokens'))} compared tokens"
    figures = (read_text(folder / name) for name in FIGURES)
    cards = "".join(f'<div class="card">{figure}</div>' for figure in figures if figure.startswith("<svg"))
    return section("Analysis", f'<div class="grid">{cards}</div>{_gradients(found)}', f"{size}.")


def _gradients(found: dict[str, Any]) -> str:
    """Return the table of the objectives: variance of their gradients, and their cost."""
    rows: list[list[object]] = []
    for item in found.get("gradients") or []:
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
