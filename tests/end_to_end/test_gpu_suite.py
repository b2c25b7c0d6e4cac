"""The GPU suite where there is no GPU: its tests and every case of its benchmark run over the stand-in for Transformer
Engine, and the script that needs a GPU says that there is none."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "helpers" / "te_on_cpu"


@pytest.mark.nightly  # CI imports tests/gpu, and runs the stand-in in tests/numerics and in two trainings
def test_the_suite_works_over_the_stand_in():
    environment = {**os.environ, "PYTHONPATH": f"{STAND_IN}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout[-6000:]
    assert "no CUDA device: memory is that of the allocator" in result.stdout
    assert " passed, 4 skipped" in result.stdout, "what was skipped shows nothing"


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="the script would start")
def test_the_script_needs_a_gpu():
    result = subprocess.run(["bash", "ci/gpu.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr == "ci/gpu.sh needs an NVIDIA GPU, and nvidia-smi finds none\n"
