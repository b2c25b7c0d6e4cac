"""The GPU suite where there is no GPU: its tests and every case of its benchmark run over the stand-in for Transformer
Engine, and the script that needs a GPU says that there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ci.gpu import PARTS, STARTING, choose, command_of
from tests.helpers.killable import Command
from tests.helpers.whole_run import check_whole_run

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "helpers" / "te_on_cpu"


@pytest.mark.nightly  # CI imports tests/gpu, and runs the stand-in in tests/numerics and in two trainings
def test_the_suite_works_over_the_stand_in():
    environment = {**os.environ, "PYTHONPATH": f"{STAND_IN}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
    assert "no CUDA device: memory is that of the allocator" in result.stdout
    assert " passed, 5 skipped" in result.stdout, "what was skipped shows nothing"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="the script would start")
def test_the_script_needs_a_gpu():
    result = subprocess.run(["bash", "ci/gpu.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "ci/gpu.sh needs an NVIDIA GPU, and nvidia-smi finds none\n"


@pytest.mark.nightly  # its parts run in CI: test_resume.py, test_train.py, distributed/test_fp8_teacher.py
def test_the_whole_run_of_the_gpu_suite_works_on_a_cpu(tmp_path):
    def start(arguments, log, die):
        return Command(arguments, log, die=die).wait()

    assert check_whole_run(tmp_path, start)["device"] == "cpu"


def test_the_script_lists_without_a_gpu_what_fits_into_its_time():
    result = subprocess.run(
        ["bash", "ci/gpu.sh", "--list", "--minutes", "4"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    left_out = [line.split()[0] for line in result.stdout.splitlines() if "left out" in line]
    assert left_out == ["start", "rollouts"]
    assert result.stdout.startswith("tests     up to")


@pytest.mark.parametrize("minutes", [0.0, 1.0, 1.5, 4.9, 5.2, 8.0, 16.5, 100.0])
def test_the_chosen_parts_fit_into_the_time_most_informative_first(minutes):
    chosen = choose(minutes)
    assert sum(part.most for part in chosen) <= minutes + 1e-9
    by_name = {part.name: part for part in PARTS}
    assert [part.name for part in chosen] == [name for name in by_name if name in {part.name for part in chosen}]
    for part in chosen:
        assert part.least <= part.most <= by_name[part.name].most + 1e-9
        if part.takes_minutes:
            assert float(command_of(part)[-1]) == pytest.approx(part.most - STARTING, abs=0.051)
    if minutes >= PARTS[0].least:
        assert chosen[0].name == PARTS[0].name
    if minutes == 100.0:
        assert [part.most for part in chosen] == [part.most for part in PARTS]


def test_every_part_of_the_script_starts_a_file_that_exists():
    for part in PARTS:
        assert (ROOT / next(word for word in part.command if "/" in word)).exists()
