"""Trials of a benchmark as processes, several at a time, until a time limit."""

import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.trial_pool import TrialFailed, TrialPool, error_line


def test_as_many_trials_run_as_are_allowed_and_a_trial_waits_for_what_it_needs():
    pool, ended, both_run = TrialPool(2, None), [], threading.Barrier(2, timeout=10)

    def run(job: str) -> None:
        if job != "needs first":
            both_run.wait()
        ended.append(job)

    def ready(job: str) -> bool:
        return job != "needs first" or "first" in ended

    assert pool.run(["needs first", "first", "second"], ready, run, lambda: None) == 0
    assert sorted(ended) == ["first", "needs first", "second"]
    assert ended.index("first") < ended.index("needs first")


def test_no_trial_begins_that_cannot_end_before_the_limit(capsys):
    pool, begun = TrialPool(1, minutes=0.5 / 60), []

    def run(job: int) -> None:
        begun.append(job)
        time.sleep(0.3)

    pool.run([1, 2, 3], lambda job: True, run, lambda: None)
    assert begun == [1] and capsys.readouterr().out.splitlines() == ["2: not begun", "3: not begun"]


def test_a_trial_is_killed_at_the_limit_and_does_not_count_as_failed(tmp_path, capsys):
    pool = TrialPool(1, minutes=0.3 / 60)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    begin = time.monotonic()
    failed = pool.run([1], lambda job: True, lambda job: pool.run_process(command, {}, tmp_path / "log"), lambda: None)
    assert failed == 0 and time.monotonic() - begin < 10
    assert capsys.readouterr().out == "1: stopped at the time limit\n"


def test_a_failed_trial_is_reported_and_ends_the_call_if_no_trial_works(tmp_path, capsys):
    pool, command = TrialPool(1, None), [sys.executable, "-c", "raise SystemExit('no GPU')"]

    def run(job: int) -> None:
        pool.run_process(command, {}, tmp_path / "log")

    assert pool.run([1, 2], lambda job: True, run, lambda: None) == 1
    assert "exit code 1: no GPU" in capsys.readouterr().out


def test_user_time_is_that_of_the_process_alone(tmp_path: Path):
    pool = TrialPool(2, None)
    busy = "for _ in range(5_000_000): pass"
    user, wall = pool.run_process([sys.executable, "-c", busy], {}, tmp_path / "busy")
    idle, _ = pool.run_process([sys.executable, "-c", "pass"], {}, tmp_path / "idle")
    assert idle < user <= wall + 0.1
    with pytest.raises(TrialFailed):
        pool.run_process([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "failed")


def test_the_line_of_a_failed_trial_is_the_error_and_no_warning_behind_it():
    assert error_line("start\ntorch.OutOfMemoryError: no memory\n[W] warning of NCCL\n").startswith("torch.OutOf")
    assert error_line("start\nend\n") == "end" and error_line("") == "no output"
