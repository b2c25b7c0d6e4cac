"""A run whose rollouts a server generates ahead ends the same, whatever is killed: the trainer or the server."""

import random
import signal
import time

import psutil
import pytest

from tests.helpers.fake_vllm import write_python
from tests.helpers.killable import Command
from tests.helpers.runs import assert_same_export, in_folder, last_step, metrics, prompt_run

STEPS = 24
KILLS = ["trainer"] * 8 + ["server"] * 12
MOST_STARTS = 2 * len(KILLS)  # a server that is killed while it starts ends the run, and the same command continues


def deterministic_metrics(run_dir):
    """Return the metrics of each step without what the speed decides and without the weight transfer."""
    ignored = ("sync/", "rollout/tokens_per_second")
    return [{name: row[name] for name in row if not name.startswith(ignored)} for row in metrics(run_dir)]


def kill_server(sync_dir, command):
    """SIGKILL the server that loads its model from `sync_dir`, once it exists; do nothing if the run ends before."""
    while command.is_running:
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words[1:3] == ["-m", "tests.helpers.fake_vllm"] and any(str(sync_dir) in word for word in words):
                process.kill()
                return
        time.sleep(0.05)


@pytest.mark.nightly
def test_twenty_kills_of_trainer_or_server_do_not_change_the_run(tmp_path):
    settings = ("rollout.ahead=1", "rollout.max_new_tokens=5", "rollout.engine=vllm", "train.seed=3")
    python = f"rollout.server.python={write_python(tmp_path)}"
    run = [*prompt_run(tmp_path, STEPS, *settings, num_hidden_layers=1), python, "evaluation.every=0"]

    def start(name, number=0):
        arguments = [*in_folder(run, tmp_path / name), f"rollout.server.sync_dir={tmp_path / f'{name}_weights'}"]
        (tmp_path / f"{name}_weights").mkdir(exist_ok=True)
        return Command(arguments, tmp_path / f"{name}_{number}.log")

    command = start("expected")
    assert command.wait(600) == 0, command.log.read_text()

    draw, starts, actual = random.Random(5), 1, tmp_path / "actual"
    draw.shuffle(KILLS)
    moments = sorted(draw.choices(range(STEPS - 3), k=len(KILLS)))
    command = start("actual", starts)
    for victim, moment in zip(KILLS, moments, strict=True):
        while last_step(actual) < moment or not command.is_running:
            if not command.is_running:
                starts += 1
                assert starts <= MOST_STARTS, command.log.read_text()
                command = start("actual", starts)
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5))
        if victim == "server":
            kill_server(tmp_path / "actual_weights", command)
        elif command.is_running:
            assert command.kill() == -signal.SIGKILL, command.log.read_text()
    while command.wait(600) != 0:
        starts += 1
        assert starts <= MOST_STARTS, command.log.read_text()
        command = start("actual", starts)
    assert deterministic_metrics(actual) == deterministic_metrics(tmp_path / "expected")
    assert_same_export(actual, tmp_path / "expected")
