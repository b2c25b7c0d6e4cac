"""Run a command of the package in a process of its own, forked from a server that has imported it: no seconds lost."""

from __future__ import annotations

import importlib
import os
import resource
import runpy
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.distributed import forked_process

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint_convert"


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it wrote."""

    code: int | None  # None: it did not end in time
    stdout: str
    stderr: str


def run(folder: Path, command: str, *arguments: str, **options: Any) -> Outcome:
    """`command` is train, evaluate, fp8_error, bridge.fit or a tool by its file name; its output passes through files
    in `folder`.

    `options`: those of `run_ranks`.
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
    """The same in a group of processes (one: without a group), as torchrun would start them, each left to end alone.

    `largest_file`: no file can grow beyond this many bytes, like on a disk that is full by then (and root cannot
    write past it either, as it can past permissions).
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
    if command in ("train", "evaluate", "fp8_error", "bridge.fit"):
        from megatron_oprd.runtime.cli import run_command

        run_command(importlib.import_module(f"megatron_oprd.{command}").main)
    sys.path.insert(0, str(TOOLS))
    runpy.run_path(str(TOOLS / command), run_name="__main__")
