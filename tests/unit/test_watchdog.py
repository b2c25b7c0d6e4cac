"""Who is to blame when a run fails or hangs: from heartbeats, from records of failures, from measured times."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from megatron_oprd.config import WatchdogConfig
from megatron_oprd.parallel.rank_zero import RankZeroFailed
from megatron_oprd.parallel.topology import collective_timeout
from megatron_oprd.resilience import failures, heartbeat, process_info, signals, straggler
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.resilience.heartbeat import Heartbeat, LocalRanks
from megatron_oprd.resilience.verdict import Sign, judge
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.progress import Place
from megatron_oprd.types import UserError

TIMEOUT, SILENT = 60.0, 20.0


def beat(rank: int, late: float, *, waits: bool = False) -> Heartbeat:
    return Heartbeat(rank, f"host{rank}", 100 + rank, 0, 3, "rollout", f"file{rank}.py:7 in work", waits, late, 0.0)


def sign(rank: int, late: float, *, waits: bool = False, silent: float = 0.0) -> Sign:
    return Sign(rank, beat(rank, late, waits=waits), silent)


def test_the_rank_that_does_not_wait_is_to_blame():
    found = judge([sign(0, 90, waits=True), sign(1, 61), sign(2, 80, waits=True)], TIMEOUT, SILENT)
    assert found.rank == 1
    assert found.line == "rank 1 on host1 hangs in rollout of step 3: no progress for 61 s at file1.py:7 in work"


def test_a_rank_that_gets_on_is_slow_and_nobody_is_to_blame():
    assert judge([sign(0, 90, waits=True), sign(1, 59), sign(2, 80, waits=True)], TIMEOUT, SILENT) is None
    assert judge([sign(0, 90), sign(1, 59)], TIMEOUT, SILENT) is None


def test_of_several_that_do_not_wait_the_one_that_stopped_first_is_to_blame():
    """On CUDA a rank that waits looks as if it worked: it stands where it looks at a value."""
    assert judge([sign(0, 62), sign(1, 65), sign(2, 61)], TIMEOUT, SILENT).rank == 1


def test_ranks_that_all_wait_are_all_told_of():
    found = judge([sign(rank, 61 + rank, waits=True) for rank in range(6)], TIMEOUT, SILENT)
    assert found.rank is None
    assert found.line.startswith(
        "all ranks wait for each other, for 66 s: rank 0 on host0 in rollout of step 3 at file0"
    )
    assert found.line.endswith("; and 2 more")
    assert judge([sign(0, 61, waits=True), sign(1, 59, waits=True)], TIMEOUT, SILENT) is None


def test_a_rank_without_a_sign_of_life_is_to_blame_before_all():
    found = judge([sign(0, 90), sign(1, 5, silent=20.0), sign(2, 61)], TIMEOUT, SILENT)
    assert found.rank == 1
    assert found.line.startswith("rank 1 on host1 gives no sign of life for 20 s, last seen in rollout of step 3 at ")
    assert judge([sign(0, 90), sign(1, 5, silent=19.0)], TIMEOUT, SILENT) is None
    assert judge([sign(0, 90, waits=True), Sign(1, None, 1.0)], TIMEOUT, SILENT) is None
    never = judge([sign(0, 90), Sign(1, None, 40.0), Sign(2, None, 40.0)], TIMEOUT, SILENT)
    assert never.line.startswith("rank 1 (and 1 more: 2) gives no sign of life for 40 s, never seen")


def test_where_a_thread_stands_and_whether_it_waits():
    here = process_info.position(threading.get_ident())
    assert here.where.endswith(" in position") and not here.waits
    assert process_info.waits_for_others(torch.distributed.distributed_c10d.__file__)
    assert not process_info.waits_for_others(torch.distributed.checkpoint.__file__)
    assert not process_info.waits_for_others(torch.__file__)


def failure(rank: int, time_: float, first: int | None) -> failures.Failure:
    line = "" if first is None else f"about {first}, says {rank}"
    return failures.Failure(rank, "host", 0, time_, "rollout", 3, "error", [], first, line)


def test_the_first_rank_that_failed_itself_is_named(tmp_path):
    for one in (failure(0, 1.0, None), failure(1, 2.0, 3), failure(2, 4.0, 2), failure(3, 3.0, 3)):
        failures.write(tmp_path, one)
    failures.write(tmp_path, dataclasses.replace(failure(4, 0.5, 4), attempt=1))
    found = failures.read(tmp_path, 1.0)
    assert [one.rank for one in found] == [0, 1, 3, 2]
    assert failures.first_of(found).line == "about 3, says 3"
    assert failures.first_of(found[:2]).line == "about 3, says 1"
    assert failures.first_of(found[:1]) is None


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_broken_connection_is_another_rank_s_failure():
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1")
    for error in (gloo, torch.distributed.DistBackendError("x"), RankZeroFailed("rank 0 failed: x")):
        assert failures.of_exception(raised(error), Place("rollout", 3), 0.0).first is None
    own = failures.of_exception(raised(ValueError("a\nb")), Place("rollout", 3), 0.0)
    assert own.first == 0 and own.line.endswith(" failed first, in rollout of step 3: ValueError: a b")
    assert own.trace[-1] == "ValueError: a\nb\n"


def test_a_new_attempt_forgets_what_an_earlier_command_left_of_it(tmp_path, monkeypatch):
    for attempt in (0, 1, 2):
        failures.write(tmp_path, dataclasses.replace(failure(0, 1.0, 0), attempt=attempt))
    failures.write(tmp_path, dataclasses.replace(failure(1, 1.0, 1), attempt=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    failures.forget(tmp_path)
    left = sorted(path.name for path in (tmp_path / "failures").iterdir())
    assert left == ["attempt_0_rank_00000.json", "attempt_2_rank_00001.json"]


def test_a_process_of_this_machine_that_is_gone_is_missed_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        here = dataclasses.replace(beat(1, 0.0), host=process_info.host(), pid=process.pid)
        heartbeat.write(tmp_path, here)
        heartbeat.write(tmp_path, dataclasses.replace(here, rank=2, pid=2**22 + 1))  # of an earlier run
        local = LocalRanks(tmp_path)
        local.look()
        assert local.gone() is None
        process.send_signal(signal.SIGKILL)
        while process_info.is_alive(process.pid):  # it is gone though nobody asked for its exit code
            time.sleep(0.01)
        assert local.gone() == here
        heartbeat.remove(tmp_path, 1)
        assert local.gone() is None


def test_stages_and_beats_are_progress(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    progress.enter("batch", 3)
    now[0] += 5
    assert progress.seconds_without_progress() == 5
    with progress.stage("rollout"):
        assert progress.seconds_without_progress() == 0
        assert str(progress.here()) == "rollout of step 3"
        now[0] += 5
        progress.beat()
        assert progress.seconds_without_progress() == 0
    assert progress.here() == Place("batch", 3)
    with pytest.raises(ValueError), progress.stage("teacher"):
        raise ValueError
    assert progress.here() == Place("teacher", 3)  # where it failed
    progress.enter("export")
    assert str(progress.here()) == "export"


QUICK = WatchdogConfig(heartbeat_seconds=0.01, timeout_seconds=1000.0)


def test_a_heartbeat_is_there_while_a_command_works_and_gone_with_it(tmp_path):
    run_dir = tmp_path / "a" / "run"
    with guarded(QUICK, run_dir):
        progress.enter("loading", 4)
        while (found := heartbeat.read(run_dir, 0)).stage != "loading":
            time.sleep(0.01)
        assert (found.pid, found.step, found.rank) == (os.getpid(), 4, 0)
    assert not (tmp_path / "a").exists()


def test_a_refused_command_leaves_nothing_and_a_failed_one_its_record(tmp_path):
    with pytest.raises(UserError), guarded(QUICK, tmp_path / "run"):
        raise UserError("no")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ZeroDivisionError), guarded(QUICK, tmp_path / "run"), progress.stage("student"):
        1 / 0  # noqa: B018
    (record,) = failures.read(tmp_path / "run", 0.0)
    assert (record.stage, record.error) == ("student", "ZeroDivisionError: division by zero")


def test_no_heartbeat_where_none_is_asked_for(tmp_path):
    with guarded(WatchdogConfig(heartbeat_seconds=0.0), tmp_path / "run"):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
        assert not (tmp_path / "run").exists()


def test_collectives_wait_longer_than_a_watchdog_that_can_tell_slow_from_hanging():
    assert collective_timeout(WatchdogConfig(heartbeat_seconds=1.0, timeout_seconds=50.0)) == 100.0
    assert collective_timeout(WatchdogConfig(heartbeat_seconds=0.0, timeout_seconds=50.0)) == 50.0


def test_signals_are_noted_inside_the_block_only():
    before = signal.getsignal(signal.SIGUSR1)
    with signals.noting():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals._noted == signal.SIGTERM
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_straggler_is_the_slowest_over_the_median():
    assert straggler.slowest([1.0, 1.0, 3.0, 1.5]) == straggler.Straggler(2, 3.0)
    assert straggler.slowest([1.0, 4.0]) == straggler.Straggler(1, 4.0)
    assert straggler.slowest([2.0]) == straggler.Straggler(0, 1.0)
    assert straggler.seconds_of_work(torch.device("cpu")) > 0
