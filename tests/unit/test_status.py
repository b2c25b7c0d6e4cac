"""The command status: where a run stands, from the files that a run really writes."""

import dataclasses
import json
import os
import threading
import time

import pytest

from megatron_oprd.commands import report, status
from megatron_oprd.commands.status import status_lines
from megatron_oprd.health.rule import HealthWarning
from megatron_oprd.resilience import failures, heartbeat
from megatron_oprd.runtime.progress import Place
from megatron_oprd.types import UserError

CONFIG = (
    "train: {steps: 10}\nrollout: {prompts_per_step: 2, samples_per_prompt: 2}\nwatchdog: {heartbeat_seconds: 10.0}\n"
)


@pytest.fixture
def run_dir(tmp_path):
    """Make the folder of a run that has no process and has made four of ten steps."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    (tmp_path / "environment.json").write_text("{}")
    log_steps(tmp_path, 4)
    (tmp_path / "checkpoints" / "step_0000002").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_0000002" / "complete").touch()
    (tmp_path / "checkpoints" / "step_0000004.partial").mkdir()
    scores = {"sums": {"avg@2": 0.25}, "all": {"avg@2": 0.5}}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"step": 3, "name": "step 3", "data": scores}) + "\n")
    return tmp_path


def log_steps(run_dir, last):
    rows = [
        {"step": step, "loss": 0.5, "rep/cosine": 0.9, "time/step": 2.0, "rollout/length_mean": 100.0}
        for step in range(1, last + 1)
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def beat(run_dir, age):
    heartbeat.write(run_dir, heartbeat.current(threading.get_ident(), Place("student", 5), age, time.time() - age))


def facts(run_dir):
    return {line[:10].strip(): line[11:] for line in status_lines(run_dir)}


def test_a_running_run_shows_its_stage_speed_metrics_checkpoint_and_evaluation(run_dir):
    beat(run_dir, age=3.0)
    found = facts(run_dir)
    assert found["state"] == "running: student of step 5"
    assert found["step"] == "4 of 10"
    assert found["speed"] == "200 response tokens/s, 12 s left"
    assert found["metrics"] == "loss 0.5000, cosine 0.9000"
    assert found["checkpoint"] == "step_0000002"
    assert found["evaluation"] == "step 3, all: avg@2 0.5000"
    assert found["processes"].startswith("1; oldest heartbeat: rank 0 on ")
    assert report.main([str(run_dir)]) == 0
    assert "running: 4 steps of 10" in (run_dir / "report.html").read_text()


def test_a_rank_without_heartbeats_is_lost(run_dir):
    beat(run_dir, age=3600.0)
    assert facts(run_dir)["state"].startswith("lost: rank 0 was killed or its machine is gone, last seen in student of")


def test_a_run_without_processes_stopped_or_finished(run_dir):
    assert facts(run_dir)["state"] == "stopped"
    log_steps(run_dir, 10)
    found = facts(run_dir)
    assert found["state"] == "finished" and "left" not in found["speed"]


def test_a_run_that_the_health_watch_stopped_says_so_and_why(run_dir):
    warning = HealthWarning(4, "entropy", "the entropy fell to a tenth: the student may be collapsing")
    (run_dir / "health").mkdir()
    (run_dir / "health" / "warnings.jsonl").write_text(json.dumps(dataclasses.asdict(warning)) + "\n")
    assert facts(run_dir)["state"] == "stopped"  # without health.stop a warning ends no run
    (run_dir / "config.yaml").write_text(CONFIG + "health: {every: 2, stop: true}\n")
    assert facts(run_dir)["state"] == f"stopped by health.stop=true: {warning.message}"
    log_steps(run_dir, 10)
    assert facts(run_dir)["state"] == "finished"


def test_a_failed_run_names_rank_and_reason_until_it_is_started_again(run_dir):
    failures.write(run_dir, failures.from_exception(ValueError("no more"), Place("rollout", 3), time.time() + 1))
    assert facts(run_dir)["state"].startswith("failed: rank 0 on ")
    assert facts(run_dir)["state"].endswith("failed first, in rollout of step 3: ValueError: no more")
    os.utime(run_dir / "environment.json", (time.time() + 60, time.time() + 60))
    assert facts(run_dir)["state"] == "stopped"


@pytest.mark.parametrize("command", [status, report])
def test_a_folder_without_a_run_is_refused(run_dir, command):
    parent, model = run_dir.parent / f"{run_dir.name}_runs", run_dir / "hf"
    for folder in (parent / "first", model):
        folder.mkdir(parents=True)
    (parent / "first" / "metrics.jsonl").touch()
    (model / "config.json").touch()
    for folder, advice in ((model, "a train.run_dir"), (parent, f"a train.run_dir (such as {parent / 'first'})")):
        with pytest.raises(UserError) as error:
            command.main([str(folder)])
        assert str(error.value).startswith(f"{folder} is not a run folder") and str(error.value).endswith(advice)
        assert not (folder / "report.html").exists()


def test_an_empty_or_broken_folder_is_described_too(tmp_path):
    assert facts(tmp_path)["state"] == "stopped" and facts(tmp_path)["step"] == "0"
    for name in ("config.yaml", "metrics.jsonl", "heartbeats/rank_00000.json", "failures/attempt_0_rank_00000.json"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"time": 1, [')
    assert facts(tmp_path)["state"] == "stopped"
