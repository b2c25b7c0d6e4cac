"""Run a function on several gloo ranks, each in a process of its own, and report which rank failed first."""

from __future__ import annotations

import datetime
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# Ranks are forked from a server that has imported the slow modules: about a second per test instead of ten.
_context.set_forkserver_preload(
    [
        "torch.utils.tensorboard",
        "megatron_oprd.train",
        "megatron_oprd.evaluate",
        "megatron_oprd.bridge.fit",
        "megatron_oprd.testing.models",
    ]
)


def forked_process(function: Callable[..., Any], args: tuple) -> Any:
    """Return a process that will call `function(*args)` when it is started."""
    return _context.Process(target=function, args=args)


def result_of(function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, computed in a process of its own.

    Raises EOFError if the function fails; its traceback is on standard error.
    """
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = forked_process(_send_result, (function, sender, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send_result(function: Callable[..., Any], sender: Connection, args: tuple) -> None:
    sender.send(function(*args))


def run_distributed(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: int = 120) -> list[Any]:
    """Call `function(rank, *args)` on every rank of a new gloo group, and return the results in rank order.

    Args:
        function: a function at the top level of a module. Its arguments and results are pickled.
        timeout_seconds: the limit for the whole call and for each collective operation.

    Raises:
        AssertionError: a rank failed or did not finish in time. The message has the traceback of the rank that failed
            first, not of the ranks that lost their connection to it.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(rank, world_size, store, sender, timeout_seconds, function, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    open_pipes = dict(zip(pipes, range(len(pipes)), strict=True))
    failures: list[tuple[float, int, str]] = []
    while open_pipes and not failures:
        ready = wait(list(open_pipes), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(open_pipes.values())} did not finish in time")
        # Other ranks fail a moment after the first one: wait for their failures, then sort all failures by time.
        time.sleep(0.0 if all(_is_success(pipe, results, open_pipes, failures) for pipe in ready) else 0.5)
    for pipe in list(open_pipes):
        if pipe.poll():
            _is_success(pipe, results, open_pipes, failures)
    if failures:
        _, rank, text = min(failures)
        raise AssertionError(f"rank {rank} failed first:\n{text}")
    return [results[rank] for rank in range(len(pipes))]


def _is_success(pipe: Any, results: dict[int, Any], open_pipes: dict[Any, int], failures: list) -> bool:
    rank = open_pipes.pop(pipe)
    try:
        failed_at, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        failed_at, value = time.time(), "the process died"
    if failed_at is None:
        results[rank] = value
    else:
        failures.append((failed_at, rank, value))
    return failed_at is None


def _rank_main(
    rank: int, world_size: int, store: str, sender: Any, timeout_seconds: int, function: Callable[..., Any], args: tuple
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    torch.set_num_threads(1)
    gc.freeze()  # the imported modules are not garbage: collections skip them
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        # A rank can have connected before its peers have noticed. A `function` that destroys the group at once would
        # close connections that other ranks are still making: "connectFullMesh failed ... Connection closed by peer".
        dist.barrier()
        message = (None, function(rank, *args))
        dist.barrier()
    except BaseException:
        message = (time.time(), traceback.format_exc())
    # Plain pickle, because torch's own would send a handle to memory of this process, which is about to end.
    sender.send_bytes(pickle.dumps(message))
    sender.close()
