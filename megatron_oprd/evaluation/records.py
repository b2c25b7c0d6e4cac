"""Read the files of a run folder for its report. A missing file, a broken line or a bad value leaves a gap."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Point = tuple[float, float]
ALL_SOURCES = "all"
Scores = dict[str, dict[str, float]]  # data source -> metric -> value


def overall_source(scores: Scores) -> str:
    """Return the name under which scores have the metrics over all data sources; "" without scores."""
    return ALL_SOURCES if scores.get(ALL_SOURCES) else next(iter(scores), "")


def read_text(path: Path) -> str:
    """Return the text of a file, or an empty string if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_jsonl(path: Path) -> list[Record]:
    """Return the objects of a JSONL file; a line that is not an object (cut off by a crash) is skipped."""
    records = []
    for line in read_text(path).split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def read_json(path: Path) -> Record:
    """Return the object of a JSON file; an empty record if the file is missing or cannot be read."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_best(run_dir: Path) -> Record:
    """Return the content of `best.json` in a run folder; an empty record if the file is missing or cannot be read."""
    return read_json(run_dir / "best.json")


def by_step(records: Sequence[Record]) -> list[Record]:
    """Sort records by step; of a step that was run again after a resume, keep the last record."""
    return [row for _, row in sorted({row["step"]: row for row in records if is_number(row.get("step"))}.items())]


def curve(metrics: Sequence[Record], key: str) -> list[Point]:
    """Return (step, value) for each step whose record has `key`."""
    return [(float(row["step"]), as_float(row[key])) for row in metrics if key in row]


def as_float(value: Any) -> float:
    """Return a float, or NaN for anything that is not a number below 1e300."""
    return float(value) if is_number(value) and abs(value) < 1e300 else float("nan")


def is_number(value: Any) -> bool:
    """Return True for an int or float that is neither NaN nor a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def get(value: Any, *keys: str) -> Any:
    """Return the value at nested keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def ordered(mappings: Any) -> list[str]:
    """Return the keys of all mappings, each once, in order of first appearance."""
    return list(dict.fromkeys(key for mapping in mappings if isinstance(mapping, dict) for key in mapping))
