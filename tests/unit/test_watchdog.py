"""The rank that holds up a run is found from heartbeats, failure records and measured times."""

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
from megatron_oprd.resilience.other_command import check_no_other_command
from megatron_oprd.resilience.verdict import RankStatus, judge
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.progress import Place
from megatron_oprd.testing.distributed import forked_process
from megatron_oprd.types import UserError

TIMEOUT, SILENT = 60.0, 20.0


def beat(rank: int, late: float, *, waits: bool = False) -> Heartbeat:
    return Heartbeat(rank, f"host{rank}", 100 + rank, 0, 3, "rollout", f"file{rank}.py:7 in work", waits, late, 0.0)


def status(rank: int, late: float, *, waits: bool = False, silent: float = 0.0) -> RankStatus:
    return RankStatus(rank, beat(rank, late, waits=waits), silent)


def test_the_rank_that_does_not_wait_for_others_hangs():
    found = judge([status(0, 90, waits=True), status(1, 61), status(2, 80, waits=True)], TIMEOUT, SILENT)
    assert found.rank == 1
    assert found.line == "rank 1 on host1 hangs in rollout of step 3: no progress for 61 s at file1.py:7 in work"


def test_a_rank_that_makes_progress_is_slow_and_not_hanging():
    assert judge([status(0, 90, waits=True), status(1, 59), status(2, 80, waits=True)], TIMEOUT, SILENT) is None
    assert judge([status(0, 90), status(1, 59)], TIMEOUT, SILENT) is None


def test_among_ranks_that_do_not_wait_the_one_longest_without_progress_hangs():
    """On CUDA a waiting rank seems to work: its thread waits in a copy to the host."""
    assert judge([status(0, 62), status(1, 65), status(2, 61)], TIMEOUT, SILENT).rank == 1


def test_ranks_that_wait_for_each_other_are_all_listed():
    found = judge([status(rank, 61 + rank, waits=True) for rank in range(6)], TIMEOUT, SILENT)
    assert found.rank is None
    assert found.line.startswith(
        "all ranks wait for each other, for 66 s: rank 0 on host0 in rollout of step 3 at file0"
    )
    assert found.line.endswith("; and 2 more")
    assert judge([status(0, 61, waits=True), status(1, 59, waits=True)], TIMEOUT, SILENT) is None


def test_a_silent_rank_is_named_before_a_hanging_one():
    found = judge([status(0, 90), status(1, 5, silent=20.0), status(2, 61)], TIMEOUT, SILENT)
    assert found.rank == 1
    assert found.line.startswith("rank 1 on host1 gives no sign of life for 20 s, last seen in rollout of step 3 at ")
    assert judge([status(0, 90), status(1, 5, silent=19.0)], TIMEOUT, SILENT) is None
    assert judge([status(0, 90, waits=True), RankStatus(1, None, 1.0)], TIMEOUT, SILENT) is None
    never = judge([status(0, 90), RankStatus(1, None, 40.0), RankStatus(2, None, 40.0)], TIMEOUT, SILENT)
    assert never.line.startswith("rank 1 (and 1 more: 2) gives no sign of life for 40 s, never seen")


def test_position_of_a_thread_and_whether_it_waits_for_other_ranks():
    here = process_info.position(threading.get_ident())
    assert here.where.endswith(" in position") and not here.waits
    assert process_info.waits_for_other_ranks(torch.distributed.distributed_c10d.__file__)
    assert not process_info.waits_for_other_ranks(torch.distributed.checkpoint.__file__)
    assert not process_info.waits_for_other_ranks(torch.__file__)


def failure(rank: int, time_: float, first: int | None) -> failures.Failure:
    line = "" if first is None else f"about {first}, says {rank}"
    return failures.Failure(rank, "host", 0, time_, "rollout", 3, "error", [], first, line)


def test_the_earliest_record_of_a_rank_about_itself_names_the_first_failure(tmp_path):
    for one in (failure(0, 1.0, None), failure(1, 2.0, 3), failure(2, 4.0, 2), failure(3, 3.0, 3)):
        failures.write(tmp_path, one)
    failures.write(tmp_path, dataclasses.replace(failure(4, 0.5, 4), attempt=1))
    found = failures.read(tmp_path, 1.0)
    assert [one.rank for one in found] == [0, 1, 3, 2]
    assert failures.first_failure(found).line == "about 3, says 3"
    assert failures.first_failure(found[:2]).line == "about 3, says 1"
    assert failures.first_failure(found[:1]) is None


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def test_a_broken_connection_follows_another_rank_s_failure():
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1")
    for error in (gloo, torch.distributed.DistBackendError("x"), RankZeroFailed("rank 0 failed: x")):
        assert failures.from_exception(raised(error), Place("rollout", 3), 0.0).first is None
    own = failures.from_exception(raised(ValueError("a\nb")), Place("rollout", 3), 0.0)
    assert own.first == 0 and own.line.endswith(" failed first, in rollout of step 3: ValueError: a b")
    assert own.trace[-1] == "ValueError: a\nb\n"


def test_a_new_attempt_removes_the_records_of_an_earlier_command(tmp_path, monkeypatch):
    for attempt in (0, 1, 2):
        failures.write(tmp_path, dataclasses.replace(failure(0, 1.0, 0), attempt=attempt))
    failures.write(tmp_path, dataclasses.replace(failure(1, 1.0, 1), attempt=2))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    failures.remove_own(tmp_path)
    left = sorted(path.name for path in (tmp_path / "failures").iterdir())
    assert left == ["attempt_0_rank_00000.json", "attempt_2_rank_00001.json"]


def test_a_killed_process_of_this_machine_is_found_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        here = dataclasses.replace(beat(1, 0.0), host=process_info.host(), pid=process.pid)
        heartbeat.write(tmp_path, here)
        heartbeat.write(tmp_path, dataclasses.replace(here, rank=2, pid=2**22 + 1))  # from an earlier run
        local = LocalRanks(tmp_path)
        local.update()
        assert local.find_killed() is None
        process.send_signal(signal.SIGKILL)
        while process_info.is_alive(process.pid):  # a zombie process counts as dead
            time.sleep(0.01)
        assert local.find_killed() == here
        heartbeat.remove(tmp_path, 1)
        assert local.find_killed() is None


def test_entering_a_stage_and_beats_count_as_progress(monkeypatch):
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
    assert progress.here() == Place("teacher", 3)  # the stage that failed
    progress.enter("export")
    assert str(progress.here()) == "export"


QUICK = WatchdogConfig(heartbeat_seconds=0.01, timeout_seconds=1000.0)


def test_the_heartbeat_file_exists_only_while_the_command_runs(tmp_path):
    run_dir = tmp_path / "a" / "run"
    with guarded(QUICK, run_dir):
        progress.enter("loading", 4)
        while (found := heartbeat.read(run_dir, 0)).stage != "loading":
            time.sleep(0.01)
        assert (found.pid, found.step, found.rank) == (os.getpid(), 4, 0)
    assert not (tmp_path / "a").exists()


def test_a_user_error_leaves_no_files_and_a_failure_leaves_a_record(tmp_path):
    with pytest.raises(UserError), guarded(QUICK, tmp_path / "run"):
        raise UserError("no")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ZeroDivisionError), guarded(QUICK, tmp_path / "run"), progress.stage("student"):
        1 / 0  # noqa: B018
    (record,) = failures.read(tmp_path / "run", 0.0)
    assert (record.stage, record.error) == ("student", "ZeroDivisionError: division by zero")


def test_a_second_command_in_the_folder_of_a_living_one_is_refused(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        last = dataclasses.replace(beat(0, 0.0), host=process_info.host(), pid=process.pid, time=time.time() + 1)
        heartbeat.write(tmp_path, last)
        with pytest.raises(UserError, match=rf"process {process.pid} on .* works in this run folder \(rollout of"):
            guarded(QUICK, tmp_path, alone=True).__enter__()
        assert heartbeat.read(tmp_path, 0) == last
        with guarded(QUICK, tmp_path):
            pass
        heartbeat.write(tmp_path, dataclasses.replace(last, time=1.0))  # of an older process with the same number
        with guarded(QUICK, tmp_path, alone=True):
            pass
        heartbeat.write(tmp_path, last)
        process.kill()
    with guarded(QUICK, tmp_path, alone=True):
        pass


def test_a_heartbeat_of_another_machine_counts_if_it_changes(tmp_path):
    seconds = 0.1
    last = dataclasses.replace(beat(0, 0.0), time=time.time())
    heartbeat.write(tmp_path, last)
    check_no_other_command(tmp_path, seconds)
    assert time.time() >= last.time + 6 * seconds
    heartbeat.write(tmp_path, last)
    check_no_other_command(tmp_path, seconds)  # old by now, so nothing is waited for
    later = dataclasses.replace(last, time=time.time() + 60)
    heartbeat.write(tmp_path, later)
    timer = threading.Timer(0.2, heartbeat.write, (tmp_path, dataclasses.replace(later, step=4)))
    timer.start()
    with pytest.raises(UserError, match="on host0 works in this run folder"):
        check_no_other_command(tmp_path, seconds)
    timer.join()


def test_heartbeat_seconds_0_turns_the_watchdog_off(tmp_path):
    with guarded(WatchdogConfig(heartbeat_seconds=0.0), tmp_path / "run"):
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())
        assert not (tmp_path / "run").exists()


def test_collectives_time_out_later_than_the_watchdog():
    assert collective_timeout(WatchdogConfig(heartbeat_seconds=1.0, timeout_seconds=50.0)) == 100.0
    assert collective_timeout(WatchdogConfig(heartbeat_seconds=0.0, timeout_seconds=50.0)) == 50.0


def test_signals_are_stored_inside_the_block_only():
    before = signal.getsignal(signal.SIGUSR1)
    with signals.handle_signals():
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals._received == signal.SIGTERM
    assert signal.getsignal(signal.SIGUSR1) is before


def receive(numbers: list[int], under_torchrun: bool) -> None:
    """Send signals to this process as if a run went on, and exit with code 0 if none of them ends it."""
    if under_torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "run"
    with signals.handle_signals():
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        os._exit(0)


@pytest.mark.parametrize(
    ("numbers", "under_torchrun", "code"),
    [
        ([signal.SIGINT], False, 0),
        ([signal.SIGINT, signal.SIGINT], False, -signal.SIGINT),
        ([signal.SIGINT, signal.SIGINT], True, -signal.SIGINT),
        ([signal.SIGINT, signal.SIGTERM], False, 0),
        ([signal.SIGINT, signal.SIGTERM], True, -signal.SIGTERM),  # torchrun answers a second Ctrl-C with SIGTERM
        ([signal.SIGTERM, signal.SIGTERM], True, 0),
    ],
)
def test_a_second_ctrl_c_ends_the_process_at_once(numbers, under_torchrun, code):
    process = forked_process(receive, (numbers, under_torchrun))
    process.start()
    process.join(60)
    assert process.exitcode == code


def test_the_straggler_ratio_is_the_slowest_rank_over_the_lower_median():
    assert straggler.slowest([1.0, 1.0, 3.0, 1.5]) == straggler.Straggler(2, 3.0)
    assert straggler.slowest([1.0, 4.0]) == straggler.Straggler(1, 4.0)
    assert straggler.slowest([2.0]) == straggler.Straggler(0, 1.0)
    assert straggler.time_products(torch.device("cpu")) > 0
