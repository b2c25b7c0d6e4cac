"""Training with a vLLM server equals training with the embedded engine; the server is a stand-in with a real model."""

import contextlib
import json
import os
import random
import signal
import time

import pytest

from tests.helpers.commands import run
from tests.helpers.fake_vllm import FakeServer, HuggingFaceModel, write_python
from tests.helpers.killable import Command, finish
from tests.helpers.runs import prompt_run

STEPS = 3
SETTINGS = ("rollout.temperature=0", "rollout.max_new_tokens=6", "evaluation.every=0", "checkpoint.export_hf=false")


def arguments(folder, *settings, steps=STEPS):
    places = [f"train.run_dir={folder / 'run'}", f"rollout.server.sync_dir={folder / 'weights'}"]
    return [*prompt_run(folder, steps, *SETTINGS), *settings, *places]


def metrics(folder):
    """Return the metrics of each step."""
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def comparable(steps):
    """Return the metrics that two equal runs share."""
    ignored = ("time/", "memory/", "sync/", "tokens_per_second")
    return [{key: value for key, value in step.items() if not key.startswith(ignored)} for step in steps]


def train(folder, *settings):
    """Train with the settings, and return the outcome and the comparable metrics of each step."""
    outcome = run(folder, "train", *arguments(folder, *settings))
    return outcome, comparable(metrics(folder)) if outcome.code == 0 else []


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Return the metrics of training with the embedded engine."""
    outcome, steps = train(tmp_path_factory.mktemp("embedded"))
    assert outcome.code == 0, outcome.stderr
    return steps


def test_training_with_a_running_server_equals_the_embedded_engine(tmp_path, embedded):
    prompt_run(tmp_path, STEPS)  # writes the student
    with FakeServer(HuggingFaceModel(str(tmp_path / "student"))) as server:
        server.max_model_len = 64
        outcome, steps = train(tmp_path, "rollout.engine=vllm", f"rollout.server.addresses=['{server.address}']")
    assert outcome.code == 0, outcome.stderr
    assert steps == embedded
    assert all(0 <= step["sync/canary_difference"] < 1e-4 for step in metrics(tmp_path))
    assert server.calls.count("/finish_weight_update") == STEPS
    assert len({step["loss"] for step in steps}) == STEPS


def test_a_started_server_that_dies_is_started_again_and_nothing_is_trained_twice(tmp_path, embedded):
    # The canary makes 6 requests after each transfer, a step 4.
    python = write_python(tmp_path, "--die-after", "17", "--once", str(tmp_path / "died"))
    outcome, steps = train(
        tmp_path, "rollout.engine=vllm", f"rollout.server.python={python}", "rollout.server.sync=nccl"
    )
    assert outcome.code == 0, outcome.stderr
    assert "through gloo (the trainer has no CUDA device)" in outcome.stdout
    assert (tmp_path / "died").exists() and "starting the server again" in outcome.stderr
    assert steps == embedded


def test_a_server_of_another_model_is_refused_before_the_models_are_loaded(tmp_path):
    with FakeServer() as server:
        outcome, _ = train(tmp_path, "rollout.engine=vllm", f"rollout.server.addresses=['{server.address}']")
    assert outcome.code == 2
    assert outcome.stderr.count("\n") == 1 and "another model: its vocabulary has fewer than the student's 259 ids" in (
        outcome.stderr
    )


@pytest.mark.nightly
@pytest.mark.parametrize("ahead", [0, 1])
def test_random_kills_of_trainer_and_server_change_nothing(tmp_path, ahead):
    expected, actual = tmp_path / "expected", tmp_path / "actual"
    kept = ("rollout.engine=vllm", f"rollout.ahead={ahead}", "checkpoint.every=1")
    for folder in (expected, actual):
        folder.mkdir()
        kept = (*kept[:3], f"rollout.server.python={write_python(folder)}")
        arguments(folder, *kept, steps=8)
    finish(arguments(expected, *kept, steps=8), tmp_path / "expected.log")
    draw, killed = random.Random(ahead), []
    command = None
    while len(killed) < 4:
        command = command or Command(arguments(actual, *kept, steps=8), tmp_path / f"{len(killed)}.log")
        before = steps_done(actual)
        while command.is_running and steps_done(actual) < min(before + len(killed) % 2, 7):
            time.sleep(0.002)
        time.sleep(draw.uniform(0.0, 0.5))
        if not command.is_running:
            break
        if len(killed) % 3:
            command.kill()
            command = None
            killed.append("trainer")
        else:
            with contextlib.suppress(OSError, ValueError, KeyError):
                state = json.loads((actual / "run" / "rollout_server" / "state.json").read_text())
                os.killpg(state["session"], signal.SIGKILL)
            killed.append("server")
    if command is None or command.wait() != 0:
        finish(arguments(actual, *kept, steps=8), tmp_path / "last.log")
    assert {"trainer", "server"} <= set(killed)
    assert comparable(metrics(actual)) == comparable(metrics(expected))


def steps_done(folder):
    path = folder / "run" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
