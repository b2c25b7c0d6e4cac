"""The recipes for clusters: their dry runs, and their Slurm script on this machine without Slurm."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.names import count_parameters
from tests.helpers.commands import run, run_ranks
from tests.helpers.runs import replay_run

ROOT = Path(__file__).parents[2]
BATCH = ROOT / "examples" / "slurm" / "train.sbatch"
DENSE = "examples/qwen3_32b_to_4b_64xh100.yaml"
EXPERTS = "examples/qwen3_235b_a22b_to_30b_a3b_512xh100.yaml"
HYBRID = "examples/qwen35_27b_to_4b_64xh100.yaml"
# Parameters in billions, from the models' cards.
CARDS = {"Qwen3-4B": 4.02, "Qwen3-32B": 32.8, "Qwen3-30B-A3B": 30.5, "Qwen3-235B-A22B": 235.1}


@pytest.mark.parametrize("name", CARDS)
def test_parameter_counts_agree_with_the_model_cards(name):
    spec = read_model_spec(ROOT / "examples" / "models" / name)
    assert count_parameters(spec) / 1e9 == pytest.approx(CARDS[name], rel=0.002)
    assert spec.eos_token_ids == (151645, 151643)


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "Qwen3.5-27B"])
def test_parameter_counts_of_hybrid_models_agree_with_transformers(name):
    folder = ROOT / "examples" / "models" / name
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.Qwen3_5ForCausalLM(config.text_config)
    model.tie_weights()
    assert count_parameters(read_model_spec(folder)) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "world", "rows", "settings"),
    [
        (DENSE, 64, 1, ["recompute.granularity=full"]),  # one trace of an update; a choice takes more
        pytest.param(DENSE, 64, 1, [], marks=pytest.mark.nightly),
        pytest.param(EXPERTS, 512, 2, [], marks=pytest.mark.nightly),
        pytest.param(HYBRID, 64, 1, [], marks=pytest.mark.nightly),
    ],
)
def test_a_recipe_fits_into_80_gb(recipe, world, rows, settings, tmp_path, monkeypatch):
    """The dry run needs no weights and no GPU. The limit leaves room for what differs on a GPU."""
    monkeypatch.chdir(ROOT)
    arguments = ("--config", recipe, f"train.run_dir={tmp_path}/run", "--dry-run", *settings)
    outcome = run(tmp_path, "train", *arguments, timeout_seconds=500)
    assert (outcome.code, outcome.stderr) == (0, "")
    text = outcome.stdout
    for words in (
        "no weights in examples/models/",
        "the longest prompt is taken to have data.max_prompt_tokens=2048 tokens",
        "one of rank bridge.ranks[0]=8 is planned",
        "planned for an H100 SXM: this machine has no GPU",
        f"({world} processes; the data sheet; not measured)",
    ):
        assert words in " ".join(text.split())
    assert len(re.findall(r"^ *\d+-\d+ ", text, re.MULTILINE)) == rows
    (peak,) = re.findall(r"^fits +([\d.]+) of 80.0 GB", text, re.MULTILINE)
    assert 20 < float(peak) < 73  # a choice leaves memory.margin free


def test_a_recipe_is_refused_by_another_number_of_processes(tmp_path):
    arguments = replay_run(tmp_path, 1, "parallel.world_size=2", "checkpoint.every=0", num_hidden_layers=1)
    message = "parallel.world_size=2: the layout is made for 2 processes, and torchrun started "
    for settings, environment in (([], {}), (["--dry-run"], {"WORLD_SIZE": "1"})):
        outcome = run_ranks(1, tmp_path, "train", *arguments, *settings, environment=environment)[0]
        assert outcome.code == 2 and message + "1" in outcome.stderr
    planned = run(tmp_path, "train", *arguments, "--dry-run")
    assert planned.code == 0 and "(2 processes; " in planned.stdout


def cluster(folder):
    """Return the environment of a Slurm job: `srun` runs on this machine, and `scontrol` logs its arguments."""
    programs = {
        "srun": 'while [ "$1" != torchrun ] && [ "$1" != pkill ]; do shift; done\nexec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" >> {folder}/scontrol.log; fi',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    bin_dir = Path(sys.executable).parent
    return {
        **os.environ,
        "PATH": f"{folder}:{bin_dir}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_NODELIST": "node[1-1]",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NODEID": "0",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "GPUS_PER_NODE": "2",
        "OMP_NUM_THREADS": "1",
        "MAX_RESTARTS": "0",
    }


def test_the_slurm_script_trains(tmp_path):
    layout = ("parallel.tensor=2", "parallel.world_size=2", "checkpoint.every=0", "checkpoint.export_hf=false")
    arguments = replay_run(tmp_path, 1, *layout, num_hidden_layers=1)
    command = ["bash", str(BATCH), *arguments]
    result = subprocess.run(command, env=cluster(tmp_path), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "scontrol.log").exists()


WORKER = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / ("saved-" + os.environ["RANK"])).touch()
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
(folder / ("started-" + os.environ["RANK"])).touch()
time.sleep(120)
sys.exit("no signal came")
"""


def test_before_the_time_limit_every_worker_gets_the_signal_to_save(tmp_path):
    """torchrun does not get the signal, and the job goes back into the queue."""
    (tmp_path / "stand_in_worker.py").write_text(WORKER)
    environment = {**cluster(tmp_path), "MODULE": "stand_in_worker", "PYTHONPATH": str(tmp_path)}
    command = ["bash", str(BATCH), str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("started-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        output, _ = job.communicate(timeout=100)
    assert job.returncode == 0, output
    assert sorted(path.name for path in tmp_path.glob("saved-*")) == ["saved-0", "saved-1"]
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"


def test_the_slurm_script_has_no_syntax_error_and_time_to_save():
    subprocess.run(["bash", "-n", str(BATCH)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(BATCH)], check=True)
    seconds = int(re.search(r"--signal=B:USR1@(\d+)", BATCH.read_text())[1])
    assert seconds >= 600


def test_the_docker_image_copies_existing_files_and_pins_megatron_core():
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    copied = [words for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for words in line.split()[:-1]]
    assert {"pyproject.toml", "megatron_oprd"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    pinned = re.search(r"megatron-core==([\d.]+)", text)[1]
    assert f"megatron-core=={pinned}\n" in (ROOT / "ci" / "constraints.txt").read_text()
    for recipe in (DENSE, EXPERTS):
        assert yaml.safe_load((ROOT / recipe).read_text())["precision"]["attention"] == "auto"
