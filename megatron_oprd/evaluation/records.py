"""What a report finds in the files of a run. Whatever is missing, cut off or no number leaves a gap, no more."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.evaluation.page import Point

Record = dict[str, Any]


def read_text(path: Path) -> str:
    """The text of a file; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_jsonl(path: Path) -> list[Record]:
    """The objects of a file; a line that is none (cut off by a crash) is skipped."""
    records = []
    for line in read_text(path).split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            records.append(value)
    return records


def by_step(records: Sequence[Record]) -> list[Record]:
    """Sorted by step; a step that was run again after a resume counts once, as it was last."""
    return [row for _, row in sorted({row["step"]: row for row in records if is_number(row.get("step"))}.items())]


def curve(metrics: Sequence[Record], key: str) -> list[Point]:
    """The value of `key` at each step that has one."""
    return [(float(row["step"]), as_float(row[key])) for row in metrics if key in row]


def as_float(value: Any) -> float:
    """Not a number for whatever is none."""
    return float(value) if is_number(value) and abs(value) < 1e300 else float("nan")


def is_number(value: Any) -> bool:
    """Whether a value is a number, not nan and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def get(value: Any, *keys: str) -> Any:
    """What stands at nested keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def ordered(mappings: Any) -> list[str]:
    """The keys of all the mappings, each once, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings if isinstance(mapping, dict) for key in mapping))
