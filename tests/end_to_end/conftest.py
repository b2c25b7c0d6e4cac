"""The demo as a newcomer runs it, once for all tests that look at it."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Demo:
    """The run folder, what was printed, and {model: (greedy, temperature 0.7)} of the table, in per cent."""

    folder: Path
    output: str
    accuracies: dict[str, tuple[float, float]]


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Demo:
    folder = tmp_path_factory.mktemp("demo") / "run"
    command = ["bash", "examples/run_oprd_qwen.sh", f"train.run_dir={folder}"]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    rows = re.findall(r"│ (student before|student after|teacher) +│ ([\d.]+) % +│ ([\d.]+) %", result.stdout)
    return Demo(folder, result.stdout, {name: (float(greedy), float(warm)) for name, greedy, warm in rows})
