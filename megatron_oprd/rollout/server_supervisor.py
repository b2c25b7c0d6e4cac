"""Run a command in a session of processes, and end the whole session with the process that asked for it.

This file is run as a script by `server_process.py`, in a session of its own. SIGKILL of the parent cannot be caught, so
the supervisor watches the number of its parent process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0  # between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1  # of Linux' prctl: a signal for the child when its parent dies


def session_processes(session: int) -> list[int]:
    """Return the numbers of the live processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (OSError, psutil.Error):
            continue
    return found


def end_session(session: int, spared: Sequence[int] = (), grace_seconds: float = GRACE_SECONDS) -> None:
    """Send SIGTERM, and after `grace_seconds` SIGKILL, to all processes of a session until none is left.

    Args:
        spared: processes that go on.
    """
    deadline = time.monotonic() + grace_seconds
    sent = signal.SIGTERM
    while remaining := [pid for pid in session_processes(session) if pid not in spared]:
        if time.monotonic() > deadline:
            sent = signal.SIGKILL
        for pid in remaining:
            try:
                os.kill(pid, sent)
            except ProcessLookupError:
                continue
        time.sleep(POLL_SECONDS)


def _die_with_supervisor() -> None:
    """Ask the kernel to kill this process when the supervisor dies. Only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main(parent: int, command: Sequence[str]) -> int:
    """Run `command` until it ends, until `parent` has died or until SIGTERM. Then end the session.

    Returns: the exit code of the command; 0 if it did not end by itself.
    """
    stopped = False

    def stop(*unused: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    child = subprocess.Popen(command, preexec_fn=_die_with_supervisor)
    while child.poll() is None and os.getppid() == parent and not stopped:
        time.sleep(POLL_SECONDS)
    code = child.poll()
    end_session(os.getsid(0), spared=[os.getpid()])
    return 0 if code is None else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
