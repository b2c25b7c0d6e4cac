"""The demo, run once for all tests that look at it."""

import fcntl
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
    """A finished run of the demo."""

    folder: Path  # the run folder
    output: str  # what the run printed
    accuracies: dict[str, tuple[float, float]]  # model -> (greedy, temperature 0.7) of the printed table, in per cent


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo with the command of the README. The workers of pytest-xdist share one run."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if is_worker else base
    folder, printed = shared / "demo" / "run", shared / "demo" / "stdout"
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.parent.mkdir(exist_ok=True)
            output = run_demo(folder)
            printed.write_text(output)
    return read_demo(folder, printed.read_text())


def read_demo(folder: Path, output: str) -> Demo:
    rows = re.findall(r"│ (student before|student after|teacher) +│ ([\d.]+) % +│ ([\d.]+) %", output)
    return Demo(folder, output, {name: (float(greedy), float(warm)) for name, greedy, warm in rows})


def run_demo(folder: Path, *arguments: str) -> str:
    command = ["bash", "examples/run_oprd_qwen.sh", f"train.run_dir={folder}", *arguments]
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout
