"""Show what a run cost: seconds of each part of a step, tokens per second and memory."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_oprd.evaluation.records import Point, Record, as_float, curve
from megatron_oprd.report.line_chart import line_chart
from megatron_oprd.report.page import Raw, number, section, table
from megatron_oprd.report.run_files import RunFiles

PARTS = ("rollout", "teacher", "student")
GIGABYTE = 1e9


def cost_section(run: RunFiles) -> str:
    """Return the table of a mean step and the curves of time, throughput and memory."""
    seconds = {part: curve(run.metrics, f"time/{part}") for part in (*PARTS, "step")}
    used = memory(run)
    charts = [
        line_chart("Seconds of a step", seconds),
        line_chart("Response tokens per second", {"tokens/s": throughput(run)}),
        line_chart("Peak memory (GB)", {"memory": used}),
    ]
    peak = f"<p>Peak memory: {number(round(max(value for _, value in used), 3))} GB</p>" if used else ""
    drawn = "".join(charts)
    grid = f'<div class="grid">{drawn}</div>' if drawn else ""
    return section("Time and memory", _mean_step(run.metrics) + peak + grid)


def memory(run: RunFiles) -> list[Point]:
    """Return (step, peak memory of rank 0 so far in GB) of each step."""
    return [(step, value / GIGABYTE) for step, value in curve(run.metrics, "memory/peak_bytes") if value > 0]


def throughput(run: RunFiles) -> list[Point]:
    """Return (step, response tokens per second) of each step."""
    rollouts = run.rollouts_per_step
    if rollouts is None:
        return []
    rows = ((row, as_float(row.get("rollout/length_mean")), as_float(row.get("time/step"))) for row in run.metrics)
    return [(float(row["step"]), length * rollouts / time) for row, length, time in rows if time > 0]


def _mean_step(metrics: Sequence[Record]) -> str:
    # The first step also compiles, allocates and warms up, so the mean leaves it out.
    steady = metrics[1:] or metrics
    seconds = {part: _mean_of(steady, f"time/{part}") for part in (*PARTS, "step")}
    total = seconds.pop("step")
    if total is None:
        return ""
    known = {part: value for part, value in seconds.items() if value is not None}
    known["other"] = max(0.0, total - sum(known.values()))
    rows: list[list[object]] = []
    for part, value in [*known.items(), ("whole step", total)]:
        share = value / total if total > 0 else 0.0
        bar = Raw(
            f'<div class="bar" style="width:{min(share, 1.0):.1%}"></div>' if part != "whole step" else "", "wide"
        )
        rows.append([part, number(round(value, 4)), f"{share:.0%}", bar])
    note = '<p class="muted">Mean seconds of a step, the first one left out.</p>'
    return note + table(["part", "seconds", "share", ""], rows)


def _mean_of(metrics: Sequence[Record], key: str) -> float | None:
    values = [value for _, value in curve(metrics, key) if value >= 0]
    return sum(values) / len(values) if values else None
