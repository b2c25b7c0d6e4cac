"""Run a function on several gloo ranks, each a fresh process, and say which rank failed first."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
# Ranks are forked from a server that has imported the slow things: about a second a test instead of ten.
_context.set_forkserver_preload(
    [
        "torch.utils.tensorboard",
        "megatron_oprd.train",
        "megatron_oprd.evaluate",
        "megatron_oprd.bridge.fit",
        "tests.helpers.models",
    ]
)


def forked_process(function: Callable[..., Any], args: tuple) -> Any:
    """A process, not yet started, forked from that server."""
    return _context.Process(target=function, args=args)


def result_of(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in a process of its own; EOFError where it failed, whose traceback is on standard error."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = forked_process(_send_result, (function, sender, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send_result(function: Callable[..., Any], sender: Any, args: tuple) -> None:
    sender.send(function(*args))


def run_distributed(world_size: int, function: Callable[..., Any], *args: Any, timeout_seconds: int = 120) -> list[Any]:
    """`function(rank, *args)` on every rank of a gloo world; returns what each returned, in rank order.

    `function` is defined at a module's top level; arguments and results are pickled. Raises AssertionError with the
    traceback of the rank that failed first, not of the victims whose connection it closed.
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
        # A victim fails a moment after the culprit: give every rank that moment, then sort by time.
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
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        message = (None, function(rank, *args))
        dist.barrier()
    except BaseException:
        message = (time.time(), traceback.format_exc())
    # Plain pickle: torch's own sends tensors as handles into a process that is about to end.
    sender.send_bytes(pickle.dumps(message))
    sender.close()
