"""Choose what `ci/gpu.sh` runs on a GPU within a time, and run it: the most informative part first.

python ci/gpu.py [--minutes 15] [--list]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STARTING = 0.4  # minutes until a part has imported its packages and built its first model


@dataclass(frozen=True)
class Part:
    """A part of the run, with the minutes that it took on an H100."""

    name: str
    shows: str
    command: tuple[str, ...]
    least: float  # minutes below which the part is left out
    most: float  # minutes that the complete part takes
    takes_minutes: bool = False  # True: the part has an option --minutes and begins no further case after that time


PARTS = (
    Part("tests", "that everything computes the right numbers", ("-m", "pytest", "-q", "tests/gpu"), 1.5, 2.0),
    Part("updates", "speed and memory: docs/results/gpu.md", ("benchmarks/gpu.py",), 1.5, 6.0, takes_minutes=True),
    Part("start", "the seconds to the first step of a 1.5B pair", ("benchmarks/start.py", "--sizes", "1.5B"), 1.5, 2.0),
    Part(
        "rollouts",
        "tokens per second: docs/results/rollouts.md",
        ("benchmarks/rollout.py", "--preset", "h100", "--repeats", "3", "--docs", "docs/results"),
        2.0,
        7.0,
        takes_minutes=True,
    ),
)


def choose(minutes: float, parts: Sequence[Part] = PARTS) -> list[Part]:
    """Return the parts that fit into `minutes`, in their order; `most` of each is the time that it may take.

    Every part first gets its least time; what remains goes to the parts in their order.
    """
    chosen: list[Part] = []
    remaining = minutes
    for part in parts:
        if part.least <= remaining:
            remaining -= part.least
            chosen.append(part)
    result = []
    for part in chosen:
        more = min(part.most - part.least, remaining)
        remaining -= more
        result.append(replace(part, most=part.least + more))
    return result


def describe(minutes: float) -> str:
    """Return a line for each part that runs, and for each that is left out."""
    chosen = choose(minutes)
    lines = [f"{part.name:<9} up to {part.most:4.1f} minutes: {part.shows}" for part in chosen]
    names = {part.name for part in chosen}
    left_out = [part for part in PARTS if part.name not in names]
    lines += [f"{part.name:<9} left out, needs {part.least:4.1f} minutes: {part.shows}" for part in left_out]
    return "\n".join(lines)


def command_of(part: Part) -> list[str]:
    """Return the command line of a part that may take `part.most` minutes."""
    limit = ["--minutes", f"{part.most - STARTING:.1f}"] if part.takes_minutes else []
    return [sys.executable, *part.command, *limit]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="ci/gpu.sh", description="Run tests and benchmarks on one GPU.")
    parser.add_argument("--minutes", type=float, default=16.5, help="time for everything; the default runs all parts")
    parser.add_argument("--list", action="store_true", help="print what would run and what would be left out, and end")
    parser.epilog = "Other options go to benchmarks/gpu.py, for example --repeats 3."
    options, others = parser.parse_known_args(arguments)
    print(describe(options.minutes), flush=True)
    if options.list:
        return 0
    begin, status = time.monotonic(), 0
    waiting = [part.name for part in choose(options.minutes)]
    while waiting:
        # A part that was faster than its estimate leaves its time to the others.
        remaining = options.minutes - (time.monotonic() - begin) / 60
        rest = choose(remaining, [part for part in PARTS if part.name in waiting])
        first = waiting.index(rest[0].name) if rest else len(waiting)
        if first > 0:
            print(f"left out, no time remains: {', '.join(waiting[:first])}", flush=True)
        if not rest:
            break
        part, waiting = rest[0], waiting[first + 1 :]
        command = [*command_of(part), *(others if part.name == "updates" else [])]
        print(f"\n== {part.name}: {' '.join(command[1:])}", flush=True)
        status = subprocess.run(command, cwd=ROOT, check=False).returncode or status
    return status


if __name__ == "__main__":
    sys.exit(main())
