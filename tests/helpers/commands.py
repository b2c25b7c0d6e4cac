"""Run a command of the package as a test: in its own process, or in this one as far as the configuration and inputs.

A process of its own is forked from a server that has imported the package already, which saves seconds per test.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import resource
import runpy
import socket
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

from megatron_oprd.launch import models as launch_models
from megatron_oprd.parallel import topology
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.testing.distributed import forked_process

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint_convert"
MODULES = ("train", "evaluate", "fp8_error", "bridge.fit", "commands.prune")


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    code: int | None  # exit code; None if the command did not end in time
    stdout: str
    stderr: str


def run(folder: Path, command: str, *arguments: str, **options: Any) -> Outcome:
    """Run a command in a process of its own and return its outcome.

    Args:
        folder: where the files with the output of the command are written.
        command: one of MODULES, the file name of a conversion tool, or the path of a script.
        options: keyword arguments of `run_ranks`.
    """
    return run_ranks(1, folder, command, *arguments, **options)[0]


def run_ranks(
    count: int,
    folder: Path,
    command: str,
    *arguments: str,
    environment: dict[str, str] | None = None,
    largest_file: int | None = None,
    timeout_seconds: int = 120,
) -> list[Outcome]:
    """Run a command on `count` ranks, with the environment that torchrun sets, and return the outcome of each rank.

    Nothing stops the other ranks when one of them fails. With `count` 1 there is no process group.

    Args:
        environment: variables that are set beside those of torchrun.
        largest_file: the largest size in bytes of any file, which simulates a full disk. Unlike file permissions, this
            limit also holds for root.
        timeout_seconds: time after which a rank that still runs is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(count):
        variables = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        variables |= environment or {}
        target = str(folder / f"rank-{rank}")
        processes.append(forked_process(_main, (target, command, arguments, variables, largest_file)))
        processes[-1].start()
    deadline = time.monotonic() + timeout_seconds
    outcomes = []
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        code = process.exitcode
        process.kill()
        process.join()
        out, err = (folder / f"rank-{rank}.{name}" for name in ("stdout", "stderr"))
        outcomes.append(Outcome(code, out.read_text(), err.read_text()))
    return outcomes


def run_until_start(command: str, *arguments: str, environment: dict[str, str] | None = None) -> Outcome | None:
    """Run a command in this process until it would join a process group, or return None if it reached that point.

    A mistake in the configuration or in the inputs is found earlier, before any global state has changed. Finding it
    here takes a fraction of the time of a process. Arguments as in `run`.
    """
    started = False

    def stop(*_: Any) -> NoReturn:
        nonlocal started
        started = True
        raise KeyboardInterrupt  # an interrupted command removes what it has begun to write

    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(launch_models, "start_process", stop),
        mock.patch.object(topology, "start_process", stop),
        mock.patch.dict(os.environ, environment or {}),
        mock.patch.object(sys, "argv", [command, *arguments]),
        mock.patch.object(sys, "path", list(sys.path)),
        warnings.catch_warnings(),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            _run_command(command)
        except SystemExit as end:
            code = end.code
    return None if started else Outcome(code, stdout.getvalue(), stderr.getvalue())


def _main(
    target: str, command: str, arguments: tuple[str, ...], environment: dict[str, str], largest_file: int | None
) -> None:
    for path, descriptor in ((f"{target}.stdout", 1), (f"{target}.stderr", 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [command, *arguments]
    _run_command(command)


def _run_command(command: str) -> NoReturn:
    if command in MODULES:
        run_command(importlib.import_module(f"megatron_oprd.{command}").main)
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(str(TOOLS / command), run_name="__main__")
    raise AssertionError(f"{command} ended without an exit code")
