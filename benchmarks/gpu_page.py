"""docs/gpu.md: the tables of a run, and the section that a run adds to the page."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu_flops import utilization

GIB = 2**30
NO_RUN = "No run yet: no GPU was at hand when this was written, and there is no measured figure on this page.\n"
SPEED = ("case", "tokens", "ms", "predicted", "tokens/s", "MFU", "recomputation counted", "step peak, GiB", "predicted")
SPEED += ("weights, GiB", "predicted")
COST = ("method", "tokens", "ms", "times OPRD, all tokens", "step peak, GiB", "predicted")


def section(record: dict[str, Any]) -> str:
    """One run: where and on what, and its tables."""
    facts = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    head = f"### {record['date']}: {record['device']}\n\n{facts}.\nMedians of {record['repeats']} runs.\n"
    return "\n".join([head, *tables(record["rows"], record["device"])])


def with_run(page: str, record: dict[str, Any]) -> str:
    """The page with one more run at its end."""
    return page.replace(NO_RUN, "").rstrip("\n") + "\n\n" + section(record)


def tables(rows: Sequence[dict[str, Any]], device: str) -> list[str]:
    """A table for each part, in the order of the rows."""
    made = []
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] == part]
        if part == "cost":
            made.append(_table(part, COST, [_cost_cells(row, own) for row in own]))
        else:
            made.append(_table(part, SPEED, [_speed_cells(row, device) for row in own]))
    return made


def line(row: dict[str, Any]) -> str:
    """A row as it is printed while the rest is still to come."""
    head = f"{row['part']}: {row['name']}, {row['tokens']:,} tokens: "
    if row["note"]:
        return head + row["note"]
    parts = [_ms(row["seconds"]) + " ms", f"step peak {_gib(row['step_peak'])} GiB"]
    if row["predicted_seconds"]:
        parts.insert(1, f"{1e3 * row['predicted_seconds']:.1f} predicted")
    return head + ", ".join(parts)


def predictions(rows: Sequence[dict[str, Any]]) -> str:
    """What is expected of the devices, `seconds` by their names in each row."""
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
    whole = utilization(row["flops"].times(1 + row["repeated"] / row["passes"]), seconds, device)
    return [
        *cells,
        _ms(row["seconds"]),
        f"{1e3 * row['predicted_seconds']:.1f}" if row["predicted_seconds"] else "",
        f"{row['tokens'] / seconds:,.0f}",
        *("" if part is None else f"{100 * part:.1f} %" for part in (used, whole)),
        *(_gib(row[key]) for key in ("step_peak", "predicted_peak", "weights", "predicted_weights")),
    ]


def _cost_cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    cells = [row["name"], f"{row['tokens']:,}"]
    if row["note"]:
        return [*cells, row["note"]]
    alike = [one for one in rows if one["tokens"] == row["tokens"] and one["name"] == "OPRD, all tokens"]
    base = next((statistics.median(one["seconds"]) for one in alike if one["seconds"]), None)
    ratio = f"{statistics.median(row['seconds']) / base:.2f}" if base else ""
    return [*cells, _ms(row["seconds"]), ratio, _gib(row["step_peak"]), _gib(row["predicted_peak"])]


def _ms(seconds: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f}"


def _gib(count: int | None) -> str:
    return "" if not count else f"{count / GIB:.2f}"


def _table(part: str, columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return f"**{part[0].upper()}{part[1:]}**\n\n" + _rows(columns, lines)


def _rows(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    full = [[*cells, *[""] * (len(columns) - len(cells))] for cells in lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *full]) + "\n"
