"""Write the tables of a GPU run, and add the section of a run to docs/results/gpu.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_flops import utilization
from benchmarks.pages import gib, listed, milliseconds, table_lines

HEADING = "## Runs"
SPEED = ("case", "tokens", "ms", "predicted", "tokens/s", "MFU", "recomputation counted", "step peak, GiB", "predicted")
SPEED += ("weights, GiB", "predicted")
COST = ("method", "tokens", "ms", "times OPRD, all tokens", "step peak, GiB", "predicted")


def section(record: dict[str, Any]) -> str:
    """Return the section of one run: date, device, versions and tables."""
    versions = listed(record["versions"])
    head = f"### {record['date']}: {record['device']}\n\n{versions}.\nMedians of {record['repeats']} runs.\n"
    return "\n".join([head, *tables(record["rows"], record["device"])])


def runs(records: Sequence[dict[str, Any]]) -> str:
    """Return the end of docs/results/gpu.md: the heading and the section of each run."""
    return "\n".join([f"{HEADING}\n", *map(section, records)])


def tables(rows: Sequence[dict[str, Any]], device: str) -> list[str]:
    """Return one table per part, in the order of the rows."""
    made = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        if part.startswith("cost"):
            made.append(_table(part, COST, [_cost_cells(row, own) for row in own]))
        else:
            made.append(_table(part, SPEED, [_speed_cells(row, device) for row in own]))
    return made


def line(row: dict[str, Any]) -> str:
    """Return the line that is printed as soon as a row is measured."""
    head = f"{row['part']}: {row['name']}, {row['tokens']:,} tokens: "
    if row["note"]:
        return head + row["note"]
    parts = [milliseconds(row["seconds"]) + " ms", f"step peak {gib(row['step_peak'])} GiB"]
    if row["predicted_seconds"]:
        parts.insert(1, f"{1e3 * row['predicted_seconds']:.1f} predicted")
    return head + ", ".join(parts)


def predictions(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of predicted times; each row has `seconds` by device name."""
    devices = list(rows[0]["seconds"])
    lines = [
        [row["part"], row["name"], f"{row['tokens']:,}"]
        + [f"{1e3 * row['seconds'][name]:.0f}" for name in devices]
        + [f"{row['tokens'] / row['seconds'][name]:,.0f}" for name in devices]
        for row in rows
    ]
    head = ("part", "case", "tokens", *(f"{name}, ms" for name in devices), *(f"{name}, tokens/s" for name in devices))
    return _rows(head, lines)


def _speed_cells(row: dict[str, Any], device: str) -> list[str]:
    cells = [row["name"], f"{row['tokens']:,}"]
    if row["note"]:
        return [*cells, row["note"]]
    seconds = statistics.median(row["seconds"])
    used = utilization(row["flops"], seconds, device)
    with_recomputation = utilization(row["flops"] * (1 + row["repeated"] / row["passes"]), seconds, device)
    return [
        *cells,
        milliseconds(row["seconds"]),
        f"{1e3 * row['predicted_seconds']:.1f}" if row["predicted_seconds"] else "",
        f"{row['tokens'] / seconds:,.0f}",
        *("" if part is None else f"{100 * part:.1f} %" for part in (used, with_recomputation)),
        *(gib(row[key]) for key in ("step_peak", "predicted_peak", "weights", "predicted_weights")),
    ]


def _cost_cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [row["name"], f"{row['tokens']:,}"]
    if row["note"]:
        return [*cells, row["note"]]
    alike = [one for one in rows if one["tokens"] == row["tokens"] and one["name"] == "OPRD, all tokens"]
    base = next((statistics.median(one["seconds"]) for one in alike if one["seconds"]), None)
    ratio = f"{statistics.median(row['seconds']) / base:.2f}" if base else ""
    return [*cells, milliseconds(row["seconds"]), ratio, gib(row["step_peak"]), gib(row["predicted_peak"])]


def _table(part: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f"**{part[0].upper()}{part[1:]}**\n\n" + _rows(columns, lines)


def _rows(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(table_lines(columns, lines)) + "\n"
