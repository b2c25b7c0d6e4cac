"""A run folder keeps what it has: configurations, metrics and the student of its run."""

import json
import shutil

from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.commands import run_until_start
from tests.helpers.killable import Command, finish
from tests.helpers.runs import VOCAB_SIZE, complete_steps, metrics, read_lines, replay_run


def refused(arguments):
    outcome = run_until_start("train", *arguments)
    assert outcome is not None and outcome.code == 2, outcome
    return outcome.stderr


def test_a_used_run_folder_keeps_configurations_metrics_and_its_student(tmp_path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    arguments = replay_run(tmp_path, 6, num_hidden_layers=1)
    finish([*arguments, "train.steps=4"], log)
    assert "holds a run of 4 steps, and train.steps=2 asks for fewer" in refused([*arguments, "train.steps=2"])
    assert "name a new train.run_dir" in refused([*arguments, "checkpoint.resume=never"])

    lines = finish([*arguments, "optimizer.lr=1.0e-4"], log).splitlines()
    assert "optimizer.lr 0.001 -> 0.0001 from step 5" in lines and "train.steps 4 -> 6 from step 5" in lines
    assert sorted(path.name for path in (run_dir / "configs").glob("*.yaml")) == [
        "step_0000001.yaml",
        "step_0000005.yaml",
    ]
    (change,) = read_lines(run_dir / "configs" / "changes.jsonl")
    assert change == {"step": 5, "changes": {"optimizer.lr": [0.001, 0.0001], "train.steps": [4, 6]}}

    other = save(random_hf_model("Qwen3", seed=9, vocab_size=VOCAB_SIZE, num_hidden_layers=1), tmp_path / "other")
    command = Command([*arguments, f"student.path={other}"], log)
    assert command.wait() == 2
    assert f"was made with another student ({tmp_path / 'student'}, " in log.read_text()
    assert "lr: 0.0001" in (run_dir / "config.yaml").read_text()

    shutil.rmtree(run_dir / "checkpoints" / "step_0000006")
    text = finish([*arguments, "train.steps=4"], log)
    assert f"{run_dir} is complete: all 4 steps are done" in text
    aside = run_dir / "replaced" / "metrics.jsonl"
    assert f"the lines of steps 5 to 6 are now in {aside}" in text
    assert [json.loads(line)["step"] for line in aside.read_text().splitlines()] == [5, 6]
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3, 4] and complete_steps(run_dir) == [4]

    shutil.rmtree(run_dir / "checkpoints")
    message = refused([*arguments, "train.steps=4", "optimizer.lr=0.5"])
    assert "holds the metrics of 4 steps of another run and no checkpoint to continue from (optimizer.lr" in message
    assert "holds a complete run of 4 steps" in refused([*arguments, "train.steps=4"])
