"""A process group of one trainer rank and all workers of one server, through which weight buckets travel.

The trainer has rank 0 and hosts a TCPStore; the workers have the ranks from 1. The group stands outside of the default
groups of both sides. Needs torch only: trainer and server import this file.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

ALIGNMENT = 16  # bytes; a tensor of any dtype can begin here
POLL_SECONDS = 0.001
ALIVE_SECONDS = 0.5  # between two checks that the other side is alive
BACKEND_KEY = "backend"

# Name, dtype like "bfloat16", and shape of each tensor of a bucket, in the order of the buffer.
Layout = Sequence[tuple[str, str, Sequence[int]]]


class GroupFailed(ValueError):
    """A member of a group cannot be reached, or does not suit the others. The message is one line."""


@dataclass
class GroupInfo:
    """The place where the members of a group meet."""

    group: str  # a name that no other group has
    host: str  # of the trainer's TCPStore
    port: int
    seconds: float  # longest wait for another member


def describe_member(device: torch.device, **more: Any) -> dict[str, Any]:
    """Return what decides the backend of a group: the versions of torch and NCCL, and the GPU of `device`."""
    cuda = device.type == "cuda"
    return {
        "torch": ".".join(torch.__version__.split(".")[:2]),
        "nccl": list(torch.cuda.nccl.version()) if cuda else None,
        "gpu": str(torch.cuda.get_device_properties(device).uuid) if cuda else None,
        **more,
    }


def choose_backend(trainer: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Return the backend, nccl or gloo, and the reason for it.

    Raises:
        GroupFailed: the versions of torch differ. Their groups might wait for each other forever.
    """
    for worker in workers:
        if worker["torch"] != trainer["torch"]:
            raise GroupFailed(
                f"the trainer has torch {trainer['torch']} and the server {worker['torch']}; a process group needs the "
                "same version on both sides; use rollout.server.sync=file"
            )
    gpus = [member["gpu"] for member in (trainer, *workers)]
    if None in gpus:
        return "gloo", f"the {'trainer' if trainer['gpu'] is None else 'server'} has no CUDA device"
    if len(set(gpus)) < len(gpus):
        return "gloo", "NCCL does not connect two processes on one GPU"
    if any(worker["nccl"] != trainer["nccl"] for worker in workers):
        return "gloo", "trainer and server have different versions of NCCL"
    return "nccl", "all members have CUDA devices"


def local_address(host: str, port: int) -> str:
    """Return this machine's address on the network interface that leads to `host`. Sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        found: str = probe.getsockname()[0]
    return found


class BucketGroup:
    """Connects one member with the others. Construction waits for all of them.

    Args:
        store: the trainer's TCPStore, or a connection to it.
        rank: 0 for the trainer.
        size: number of members.
        backend: `nccl` or `gloo`.
        device: of this member; buffers of a gloo group are on the CPU.
        address: this machine's address that the other members can reach.
        seconds: longest wait for another member.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        size: int,
        *,
        backend: str,
        device: torch.device,
        address: str,
        seconds: float,
    ) -> None:
        self.device = device if backend == "nccl" else torch.device("cpu")
        self._rank, self._size, self._seconds = rank, size, seconds
        self._store = store
        self._buckets = 0
        timeout = datetime.timedelta(seconds=seconds)
        members = dist.PrefixStore("members", store)
        if backend == "nccl":
            with _blocking_wait():
                self._group: Any = dist.ProcessGroupNCCL(members, rank, size, timeout)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            options._timeout, options._threads = timeout, 1
            self._group = dist.ProcessGroupGloo(members, rank, size, options)

    def send(self, buffer: torch.Tensor, check_alive: Callable[[], None]) -> None:
        """Send one buffer to all workers, once all of them wait for it.

        A kernel of NCCL therefore never occupies a GPU while the server loads buckets of other ranks.

        Args:
            buffer: of type uint8, [bytes].
            check_alive: raises an error if the server has failed.
        """
        self._buckets += 1
        keys = [f"ready/{self._buckets}/{rank}" for rank in range(1, self._size)]
        wait_until(lambda: self._store.check(keys), check_alive, self._seconds)
        self._broadcast(buffer.to(self.device), check_alive)

    def receive(self, size: int) -> torch.Tensor:
        """Return the next buffer of the trainer, `size` bytes. Raises an error if the trainer fails."""
        self._buckets += 1
        self._store.set(f"ready/{self._buckets}/{self._rank}", "")
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._broadcast(buffer, lambda: self._store.check([BACKEND_KEY]))
        return buffer

    def close(self) -> None:
        """Leave the group. Nothing may be on its way."""
        self._group.abort()

    def _broadcast(self, buffer: torch.Tensor, check_alive: Callable[[], Any]) -> None:
        try:
            work = self._group.broadcast(buffer, 0)
            wait_until(work.is_completed, check_alive, self._seconds)
            work.wait()
        except Exception:
            self._group.abort()  # a kernel of NCCL would wait for the other members forever
            raise
        if buffer.is_cuda:
            torch.cuda.current_stream(buffer.device).synchronize()


def join_group(info: GroupInfo, worker: int, workers: int, device: torch.device) -> BucketGroup:
    """Enter the group of a trainer rank as worker number `worker` of `workers`, from 0.

    Raises:
        GroupFailed: the trainer cannot be reached, or does not answer.
    """
    timeout = datetime.timedelta(seconds=info.seconds)
    try:
        store = dist.TCPStore(info.host, info.port, is_master=False, timeout=timeout, wait_for_workers=False)
        store.set(f"worker/{worker}", json.dumps(describe_member(device, workers=workers)))
        backend = store.get(BACKEND_KEY).decode()
        address = local_address(info.host, info.port)
        return BucketGroup(
            store, worker + 1, workers + 1, backend=backend, device=device, address=address, seconds=info.seconds
        )
    except (RuntimeError, OSError) as error:
        raise GroupFailed(f"no connection to the trainer at {info.host}:{info.port}: {first_line(error)}") from None


def receive_bucket(group: BucketGroup, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors of the trainer's next bucket. Raises GroupFailed."""
    try:
        buffer = group.receive(buffer_bytes(layout))
    except (RuntimeError, TimeoutError) as error:
        raise GroupFailed(f"the trainer's bucket did not arrive: {first_line(error)}") from None
    return unpack(buffer, layout)


def layout_of(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str, list[int]]]:
    """Return the layout of a buffer for the tensors."""
    return [(name, str(one.dtype).removeprefix("torch."), list(one.shape)) for name, one in tensors.items()]


def buffer_bytes(layout: Layout) -> int:
    """Return the size of a buffer."""
    return sum(_padded(_tensor_bytes(dtype, shape)) for _, dtype, shape in layout)


def pack(tensors: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a buffer on `device` with copies of the tensors, of type uint8, [bytes]."""
    layout = layout_of(tensors)
    buffer = torch.zeros(buffer_bytes(layout), dtype=torch.uint8, device=device)
    for place, tensor in zip(unpack(buffer, layout).values(), tensors.values(), strict=True):
        place.copy_(tensor)
    return buffer


def unpack(buffer: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
    """Return the tensors of a buffer by name. They share its memory."""
    tensors, start = {}, 0
    for name, dtype, shape in layout:
        size = _tensor_bytes(dtype, shape)
        tensors[name] = buffer[start : start + size].view(getattr(torch, dtype)).view(list(shape))
        start += _padded(size)
    return tensors


def wait_until(done: Callable[[], bool], check_alive: Callable[[], Any], seconds: float) -> None:
    """Poll `done`, and now and then `check_alive`, which may raise. Raises TimeoutError after `seconds`."""
    start = checked = time.monotonic()
    while not done():
        now = time.monotonic()
        if now - checked > ALIVE_SECONDS:
            check_alive()
            checked = now
        if now - start > seconds:
            raise TimeoutError(f"no answer for {seconds:g} s")
        time.sleep(POLL_SECONDS)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _tensor_bytes(dtype: str, shape: Sequence[int]) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return math.prod(shape) * kind.itemsize


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


_environment_lock = threading.Lock()


@contextlib.contextmanager
def _blocking_wait() -> Iterator[None]:
    """Let a NCCL group that is made inside report errors to its caller; its watchdog would end the process."""
    name = "TORCH_NCCL_BLOCKING_WAIT"
    with _environment_lock:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
