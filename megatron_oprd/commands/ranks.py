"""Processes and layouts of the commands that convert, compare and prune checkpoints."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from megatron_oprd.runtime.cli import end_loading, start_loading

if TYPE_CHECKING:
    from megatron_oprd.parallel.topology import Topology


def run_in_layout(
    command: Callable[[argparse.Namespace], int],
    args: argparse.Namespace,
    module: str,
    arguments: list[str] | None,
    device: str = "cpu",
) -> int:
    """Run a command in `args.tensor * args.pipeline` processes, and return the exit code.

    Args:
        command: runs in each process, where torch is imported; it begins with `start_topology` and need not end it.
        args: the parsed arguments.
        module: name of the command's module, which each started process runs.
        arguments: the command line; None: that of this process.
        device: cpu hides CUDA devices; auto leaves them visible.
    """
    code = _start_ranks(args.tensor * args.pipeline, module, arguments)
    if code is not None:
        return code
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _work_offline()
    start_loading()
    end_loading()
    code = command(args)
    _leave()
    return code


def _work_offline() -> None:
    """Keep other libraries offline and without messages. Call before they are imported."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore")


def add_layout(parser: argparse.ArgumentParser, why: str) -> None:
    """Add the options --tensor and --pipeline."""
    parser.add_argument("--tensor", type=positive, default=1, metavar="N", help=f"tensor-parallel ranks: {why}")
    parser.add_argument("--pipeline", type=positive, default=1, metavar="N", help="pipeline stages, likewise")


def positive(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _start_ranks(count: int, module: str, arguments: list[str] | None) -> int | None:
    """Run a command module in `count` processes and return the exit code.

    Args:
        module: name of the module that each process runs.
        arguments: the command line; None: that of this process.

    Returns: None if this process is one of the ranks: with one process, under torchrun, or in a started process.
    """
    if count == 1 or "RANK" in os.environ:
        return None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", threads)
    # -P: a file torch.py in the current folder must not replace the package.
    command = [sys.executable, "-P", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    try:
        return _wait(ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _wait(ranks: list[subprocess.Popen]) -> int:
    """Return the exit code of rank 0. After a rank fails, the others have 20 seconds to end by themselves."""
    deadline = None
    while any(rank.poll() is None for rank in ranks):
        if deadline is None and any(rank.poll() for rank in ranks):
            deadline = time.monotonic() + 20
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return ranks[0].poll() or next((code for rank in ranks if (code := rank.poll())), 0)


def start_topology(tensor: int, pipeline: int, device: str = "cpu") -> Topology:
    """Start the process group and return its topology. Raises UserError if the layout does not fit its size.

    `device`: cpu, or auto for CUDA where the machine has it.
    """
    from megatron_oprd.config import ParallelConfig
    from megatron_oprd.parallel.topology import build_topology, start_process
    from megatron_oprd.runtime.platform import choose_device

    chosen = choose_device(device)
    start_process(chosen)
    return build_topology(ParallelConfig(tensor=tensor, pipeline=pipeline), chosen, seed=0)


def _leave() -> None:
    """Destroy the process group at the normal end of a command."""
    import torch.distributed as dist

    dist.destroy_process_group()
