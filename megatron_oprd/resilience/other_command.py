"""Refuse a second training in the run folder of one that still goes on: both would write the same files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from megatron_oprd.report.run_state import HEARTBEATS_MISSED
from megatron_oprd.resilience import heartbeat, process_info
from megatron_oprd.resilience.heartbeat import Heartbeat
from megatron_oprd.types import UserError


def check_no_other_command(run_dir: Path, heartbeat_seconds: float) -> None:
    """Raise UserError if the heartbeat of rank 0 in a run folder is that of another process that still runs.

    Rank 0 calls this before it writes heartbeats of its own. A heartbeat that a killed process of this machine left is
    recognised at once. If it comes from another machine, wait until it changes or is HEARTBEATS_MISSED heartbeats old.

    Args:
        run_dir: the run folder.
        heartbeat_seconds: time between two heartbeats of a rank.
    """
    last = heartbeat.read(run_dir, 0)
    if last is None or last.pid == os.getpid():
        return
    if _runs_here(last) if last.host == process_info.host() else _beats_again(run_dir, last, heartbeat_seconds):
        raise UserError(
            f"{run_dir}: process {last.pid} on {last.host} works in this run folder ({last.place}); wait for it, end "
            "it, or name another train.run_dir"
        )


def _runs_here(last: Heartbeat) -> bool:
    """Return True if the process of a heartbeat runs on this machine. A later process may have the same number."""
    try:
        return process_info.is_alive(last.pid) and psutil.Process(last.pid).create_time() < last.time
    except psutil.Error:
        return False


def _beats_again(run_dir: Path, last: Heartbeat, heartbeat_seconds: float) -> bool:
    """Wait for the next heartbeat of another machine. Return False if none comes, or if the file is removed."""
    found, end = last, last.time + HEARTBEATS_MISSED * heartbeat_seconds
    if time.time() < end:
        print(f"waiting to see whether the process on {last.host} still works in {run_dir} ...", flush=True)
    while found == last and time.time() < end:
        time.sleep(min(1.0, heartbeat_seconds))
        new = heartbeat.read(run_dir, 0)
        if new is None:
            return False
        found = new
    return found != last
