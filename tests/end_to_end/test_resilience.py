"""Signals in a run of four ranks, and ranks that are killed, hang, stop or fail under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.killable import Command, finish
from tests.helpers.runs import (
    assert_same_export,
    complete_steps,
    in_folder,
    last_step,
    metrics,
    prompt_run,
    read_lines,
    replay_run,
)

ROOT = Path(__file__).parents[2]
STEPS = 8
TIMEOUT_SECONDS = 12  # of the watchdog, where a rank hangs


class Torchrun:
    """A training under torchrun, started by the package's command. Its output goes to `log`."""

    def __init__(self, arguments: list[str], log: Path, *, ranks: int = 4, restarts: int = 0, script: str = "") -> None:
        self.log = log
        command = [sys.executable, "-m", "megatron_oprd.torchrun", "--standalone", f"--nproc-per-node={ranks}"]
        command += [f"--max-restarts={restarts}", *([script] if script else ["-m", "megatron_oprd.train"]), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WOUNDED": str(log.parent)}
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def wait_until(self, reached: Callable[[], bool]) -> None:
        while not reached():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)

    def wait(self) -> int:
        """Return torchrun's exit code."""
        return self.process.wait(timeout=300)


@contextlib.contextmanager
def torchrun(*args, **options) -> Iterator[Torchrun]:
    """Start a run under torchrun and end all its processes with the block."""
    run = Torchrun(*args, **options)
    try:
        yield run
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.wait()


def pid_of(run_dir: Path, rank: int) -> int:
    """Return the process id in a rank's heartbeat."""
    return json.loads((run_dir / "heartbeats" / f"rank_{rank:05d}.json").read_text())["pid"]


def records(run_dir: Path, attempt: int) -> dict[int, dict]:
    """Return the failure records of an attempt by rank."""
    found = (json.loads(path.read_text()) for path in (run_dir / "failures").glob(f"attempt_{attempt}_rank_*.json"))
    return {record["rank"]: record for record in found}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    settings = ("evaluation.every=3", "parallel.tensor=2", "rollout.ahead=1", "watchdog.heartbeat_seconds=0.5")
    return prompt_run(tmp_path_factory.mktemp("inputs"), STEPS, *settings, num_hidden_layers=2)


@pytest.fixture(scope="module")
def expected(arguments, tmp_path_factory) -> Path:
    """Return the run folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("expected")
    finish(in_folder(arguments, folder / "run"), folder / "log", world_size=4)
    return folder / "run"


def assert_as_expected(actual: Path, expected: Path) -> None:
    assert metrics(actual) == metrics(expected)
    assert read_lines(actual / "evaluations.jsonl") == read_lines(expected / "evaluations.jsonl")
    assert_same_export(actual, expected)


def test_a_signal_to_one_rank_saves_and_stops_all_ranks_and_the_same_command_continues(arguments, expected, tmp_path):
    actual = tmp_path / "run"
    command = [*in_folder(arguments, actual), "checkpoint.every=0"]
    run = Command(command, tmp_path / "log", world_size=4)
    while last_step(actual) < 1:
        assert run.is_running, run.log.read_text()
        time.sleep(0.02)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        os.kill(pid_of(actual, 2), number)
    assert run.wait() == 0, run.log.read_text()
    message = re.search(
        r"^SIG\w+: step (\d+) saved in (.*); the same command continues$", run.log.read_text(), re.MULTILINE
    )
    assert message, run.log.read_text()
    step = int(message[1])
    assert complete_steps(actual) == [step] and last_step(actual) == step < STEPS
    assert message[2] == str(actual / "checkpoints" / f"step_{step:07d}")
    left = {path.name for path in actual.iterdir()}
    assert not left & {"hf", "heartbeats", "failures"}
    assert f"stopped: {step} steps of {STEPS}" in (actual / "report.html").read_text()
    finish(command, tmp_path / "log", world_size=4)
    assert_as_expected(actual, expected)


def test_ctrl_c_saves_after_the_step_and_prints_no_traceback(tmp_path):
    actual = tmp_path / "run"
    command = in_folder(replay_run(tmp_path, 200, "checkpoint.every=0", num_hidden_layers=1), actual)
    with torchrun(command, tmp_path / "log", ranks=2) as run:
        run.wait_until(lambda: last_step(actual) >= 2)
        os.killpg(run.process.pid, signal.SIGINT)  # like a terminal
        assert run.wait() == 0, run.log.read_text()
    log = run.log.read_text()
    announced = re.findall(
        r"^SIGINT: the run saves after step (\d+) and stops; press Ctrl-C again to", log, re.MULTILINE
    )
    assert len(announced) == 1 and "Traceback" not in log, log
    (step,) = complete_steps(actual)
    assert f"SIGINT: step {step} saved in " in log and step - int(announced[0]) in (-1, 0, 1)


def test_ctrl_c_in_a_run_of_one_process_saves_after_the_step(tmp_path):
    actual = tmp_path / "run"
    settings = ("checkpoint.every=0", "watchdog.heartbeat_seconds=0.5")
    run = Command(in_folder(replay_run(tmp_path, 200, *settings, num_hidden_layers=1), actual), tmp_path / "log")
    while last_step(actual) < 2:
        assert run.is_running, run.log.read_text()
        time.sleep(0.02)
    os.kill(pid_of(actual, 0), signal.SIGINT)
    assert run.wait() == 0, run.log.read_text()
    log = run.log.read_text()
    (step,) = complete_steps(actual)
    assert "and stops; press Ctrl-C again to stop now\n" in log and f"SIGINT: step {step} saved in " in log
    assert step < 200 and "Traceback" not in log


@pytest.mark.nightly  # its parts run in CI: test_watchdog.py, test_resume.py and the signal above
def test_a_killed_rank_is_named_and_the_restarted_run_ends_the_same(arguments, expected, tmp_path):
    actual = tmp_path / "run"
    with torchrun(in_folder(arguments, actual), tmp_path / "log", restarts=3) as run:
        run.wait_until(lambda: last_step(actual) >= 3)
        os.kill(pid_of(actual, 3), signal.SIGKILL)
        assert run.wait() == 0, run.log.read_text()
    log = run.log.read_text()
    for rank in (0, 1, 2):
        assert re.search(rf"^error: rank {rank} ends, as rank 3 on \S+ was killed, last seen in ", log, re.MULTILINE), (
            log
        )
    assert sorted(records(actual, 0)) == [0, 1, 2] and not records(actual, 1)
    assert len(re.findall("^continuing from", log, re.MULTILINE)) == 1
    assert_as_expected(actual, expected)


@pytest.mark.nightly
def test_the_rank_that_hangs_fails_or_is_stopped_is_named(arguments, tmp_path):
    """Three attempts of one run: rank 1 sleeps, then rank 3 raises, then rank 2 is stopped from outside."""
    actual = tmp_path / "run"
    settings = ("checkpoint.every=1", "train.steps=1000", f"watchdog.timeout_seconds={TIMEOUT_SECONDS}")
    command = [*in_folder(arguments, actual), *settings]
    script = str(ROOT / "tests" / "helpers" / "wounded.py")
    with torchrun(command, tmp_path / "log", restarts=2, script=script) as run:
        run.wait_until(lambda: last_step(actual) >= 3)
        stopped = pid_of(actual, 2)
        os.kill(stopped, signal.SIGSTOP)
        run.wait_until(lambda: sorted(records(actual, 2)) == [0, 1, 3])
        os.kill(stopped, signal.SIGKILL)  # torchrun itself would wait half a minute
        assert run.wait() != 0
    log = run.log.read_text()
    asleep, raised, silent = (records(actual, attempt) for attempt in range(3))

    assert re.fullmatch(
        r"rank 1 on \S+ hangs in student of step 2: no progress for \d+ s at \S+wounded.py:\d+ in fall_asleep",
        asleep[1]["line"],
    )
    assert "in fall_asleep\n" in "".join(asleep[1]["trace"])
    assert f"error: {asleep[1]['line']}\n" in log

    assert (raised[3]["stage"], raised[3]["step"]) == ("rollout", 2)
    assert raised[3]["line"].endswith("failed first, in rollout of step 2: ValueError: no more of this")
    assert f"error: {raised[3]['line']}\n" in log
    assert log.count("Traceback (most recent call last):\n") == 2  # the other is torchrun's own
    for rank in (0, 1, 2):
        assert f"error: rank {rank} ends, as {raised[3]['line']}\n" in log

    for rank in (0, 1, 3):
        assert silent[rank]["first"] in (2, None)
    named = re.findall(
        r"^error: rank (\d) ends, as rank 2 on \S+ gives no sign of life for \d+ s, last seen", log, re.M
    )
    assert sorted(named) == ["0", "1", "3"], log
