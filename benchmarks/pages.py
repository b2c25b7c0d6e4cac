"""Tables and figures of the Markdown pages that the benchmarks write into docs/."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

GIB, MIB = 2**30, 2**20
PACKAGES = ("torch", "megatron-core", "transformers")


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the figures."""
    return {package: version(package) for package in PACKAGES}


def listed(facts: Mapping[str, Any]) -> str:
    """Return facts in one line: `torch 2.13.0, megatron-core 0.16.1`."""
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def table_lines(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a Markdown table; short rows are filled with empty cells."""
    full = [[*row, *[""] * (len(head) - len(row))] for row in rows]
    return [f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *full)]


def with_section(page: str, heading: str, section: str) -> str:
    """Return the page with `section`, which begins with `heading`, in place of its old last section."""
    before = page.partition(heading)[0].rstrip()
    return f"{before}\n\n{section}" if before else section


def spread(values: Sequence[float]) -> str:
    """Return the mean and, in brackets, the lowest and the highest value."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def milliseconds(seconds: Sequence[float]) -> str:
    """Return the median in milliseconds."""
    return f"{1e3 * statistics.median(seconds):.1f}"


def gib(count: int | None) -> str:
    """Return bytes in GiB, or an empty cell when there is no figure."""
    return f"{count / GIB:.2f}" if count else ""
