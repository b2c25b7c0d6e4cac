"""The wheel holds everything that a user without a clone needs."""

import os
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.runs import prompt_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Install the wheel into a fresh environment, which takes the other packages from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # the last commit: building in place would leave files behind
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    venv.create(folder / "env", with_pip=True)
    packages = next((folder / "env" / "lib").glob("python*/site-packages"))
    python = folder / "env" / "bin" / "python"
    subprocess.run([python, "-I", "-m", "pip", "install", "-q", "--no-deps", *folder.glob("*.whl")], check=True)
    # After the installation, because pip would find this package in the other environment. -I hides PYTHONPATH from it.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder / "env" / "bin" / "megatron-oprd"


@pytest.mark.nightly
def test_every_command_of_an_installed_wheel_works_in_an_empty_folder(program, tmp_path):
    settings = prompt_run(tmp_path, 2)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def run(*arguments):
        done = subprocess.run([program, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run("convert", "--hf", "student", "--megatron", "mcore")
    assert run("verify", "--hf", "student", "--megatron", "mcore", "--tensor", "2").endswith("equal\n")
    assert "lr: 1e-05" in run("config", "optimizer.lr")
    assert "\nfits " in run("plan", *settings)
    run("train", *settings, f"student.path={tmp_path / 'mcore'}")
    assert "2 of 2" in run("status", "run")
    assert "report.html" in run("report", "run")
    run("evaluate", *settings, f"student.path={tmp_path / 'run' / 'hf'}")
    run("export", "--megatron", "run/checkpoints/step_0000002/model", "--hf", "back")
    run("fit-bridge", *settings, "bridge.prompts=4", "bridge.ranks=2", "bridge.held_out_fraction=0.5")
    run("fp8-error", *settings, "precision.teacher_fp8=weights", f"train.run_dir={tmp_path / 'fp8'}")
