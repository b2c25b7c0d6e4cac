"""Commands of the package as real processes: to be killed from outside, or to kill themselves at a file operation."""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_oprd.testing.distributed import forked_process

# (operation, path) -> whether to die before it. The operations are Python's audit events.
Death = Callable[[str, str], bool]
_OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


@dataclass(frozen=True)
class DieAfterStep:
    """Die before file operation `number` below `folder`, counted from 0 at the first on a file of a step >= `step`."""

    folder: Path
    step: int
    number: int

    def death(self) -> Death:
        remaining: int | None = None

        def dies(operation: str, path: str) -> bool:
            nonlocal remaining
            if not path.startswith(str(self.folder)):
                return False
            if remaining is not None:
                remaining -= 1
            elif _step_of(path) >= self.step:
                remaining = self.number
            return remaining == 0

        return dies


@dataclass(frozen=True)
class DieBefore:
    """Die before the first `operation` on a path in which the regular expression `pattern` is found."""

    operation: str
    pattern: str

    def death(self) -> Death:
        return lambda operation, path: operation == self.operation and re.search(self.pattern, path) is not None


class Command:
    """`megatron_oprd.<module>` with these arguments on `world_size` ranks, forked with its imports done.

    Its output goes to `log`. With `die`, every rank kills itself (SIGKILL) where that says.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        module: str = "train",
        world_size: int = 1,
        die: DieAfterStep | DieBefore | None = None,
    ) -> None:
        self.log = log
        self._store = tempfile.TemporaryDirectory()
        ranks = [
            (module, list(arguments), str(log), rank, world_size, self._store.name, die) for rank in range(world_size)
        ]
        self._processes = [forked_process(run_command_here, rank) for rank in ranks]
        for process in self._processes:
            process.daemon = True
            process.start()

    @property
    def is_running(self) -> bool:
        return any(process.is_alive() for process in self._processes)

    def kill(self) -> int:
        """SIGKILL to every rank; what `wait` returns."""
        for process in self._processes:
            process.kill()
        return self.wait()

    def wait(self, timeout_seconds: int = 120) -> int:
        """Return the first exit code that is not 0, or 0. Raises AssertionError for a rank that does not end."""
        for process in self._processes:
            process.join(timeout_seconds)
        ended = not self.is_running
        for process in self._processes:
            process.kill()
            process.join()
        self._store.cleanup()
        assert ended, f"did not end in {timeout_seconds} s:\n{self.log.read_text()}"
        return next((process.exitcode for process in self._processes if process.exitcode), 0)


def finish(arguments: Sequence[str], log: Path, **options: Any) -> str:
    """Run a command to its end and return what it printed. AssertionError when it fails."""
    command = Command(arguments, log, **options)
    code = command.wait()
    assert code == 0, f"exit code {code}:\n{log.read_text()}"
    return log.read_text()


def run_command_here(
    module: str,
    arguments: list[str],
    log: str,
    rank: int,
    world_size: int,
    store: str,
    die: DieAfterStep | DieBefore | None,
) -> None:
    """Run a command in this process, as one of `world_size` ranks that meet in the folder `store`."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from megatron_oprd.runtime.cli import run_command

    torch.set_num_threads(1)
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
        file_store = torch.distributed.FileStore(str(Path(store, "store")), world_size)
        torch.distributed.init_process_group("gloo", store=file_store, rank=rank, world_size=world_size)
    if die is not None:
        _die_where(die.death())
    main = importlib.import_module(f"megatron_oprd.{module}").main
    run_command(lambda: main(arguments))


def _die_where(dies: Death) -> None:
    """Python announces each file operation to audit hooks before it makes it."""

    def hook(operation: str, args: tuple[Any, ...]) -> None:
        if operation not in _OPERATIONS or not isinstance(args[0], (str, os.PathLike)):
            return
        reads = operation == "open" and isinstance(args[1], str) and not set(args[1]) & set("wax+")
        if not reads and dies(operation, os.fspath(args[0])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _step_of(path: str) -> int:
    """Return the number in `.../step_0000012...`, or -1."""
    _, found, rest = path.rpartition("/step_")
    return int(rest[:7]) if found and rest[:7].isdigit() else -1
