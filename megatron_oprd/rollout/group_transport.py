"""The transport of weights through process groups: NCCL between GPUs, gloo otherwise.

Each rank that sends has one group with the workers of each server. A group lives for one update: a server that was
restarted needs no special case, no buffers of NCCL occupy memory while the student trains, and ranks and servers never
wait for each other inside one group. Gloo makes a group in milliseconds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.bucket_group import (
    BACKEND_KEY,
    BucketGroup,
    GroupFailed,
    GroupInfo,
    choose_backend,
    describe_member,
    first_line,
    layout_of,
    local_address,
    pack,
    unpack,
    wait_until,
)
from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.buckets import checksum
from megatron_oprd.rollout.server_client import ServerClient, ServerError
from megatron_oprd.rollout.threads import in_thread
from megatron_oprd.rollout.weight_transport import BucketFiles
from megatron_oprd.runtime import progress

FAILURE_SECONDS = 1.0  # a call to a server fails soon after its connection to a group broke


class GroupTransport:
    """Sends each bucket through a process group to all workers of a server.

    Args:
        copies: files for copies of the buckets, from which a server is loaded that ends while it generates. They are
            written beside other work. None: no copies.
        device: of this rank.
        verbose: print the backend of each server whenever it changes.
    """

    def __init__(
        self,
        copies: BucketFiles | None,
        clients: Sequence[ServerClient],
        device: torch.device,
        *,
        verbose: bool = False,
    ) -> None:
        self._copies = copies
        self._clients = clients
        self._device = device
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="copies of weights")
        self._writing: list[Future[None]] = []
        self._connections: dict[str, _Connection] = {}  # of the open update, by address of the server
        self._loading: list[tuple[ServerClient, Future[None]]] = []
        self._sent: list[dict[str, Any]] = []  # descriptions of the copies
        self._header: dict[str, Any] = {}
        self._verbose = verbose
        self._printed: dict[str, str] = {}  # by address of the server

    def start(self, version: str, total_tensors: int) -> None:
        """Begin the buckets of this rank. Raises UserError if a copy of the last update could not be written."""
        self._header = {"version": version, "total_tensors": total_tensors}
        self._sent, self._loading, self._connections = [], [], {}
        writing, self._writing = self._writing, []
        for future in writing:
            future.result()

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy one bucket, wait until the bucket before is loaded, and send this one in threads."""
        progress.beat()
        layout, buffer = layout_of(tensors), pack(tensors, self._device)
        # Reading the checksums waits until the GPU has copied the tensors; the threads have streams of their own.
        checksums = {name: checksum(tensor) for name, tensor in unpack(buffer, layout).items()}
        info = {**self._header, "checksums": checksums}
        if self._copies is not None:
            path = self._copies.path(self._header["version"], len(self._sent))
            self._writing.append(self._writer.submit(self._copies.write, path, unpack(buffer.cpu(), layout)))
            self._sent.append({**info, "path": str(path)})
        self._wait()
        self._loading = [
            (client, in_thread(self._send, client, {**info, "layout": layout}, buffer)) for client in self._clients
        ]

    def finish(self) -> list[dict[str, Any]]:
        """Wait until all servers have loaded the buckets of this rank, and return the descriptions of the copies."""
        self._wait()
        for address, connection in self._connections.items():
            if self._verbose and self._printed.get(address) != connection.description:
                self._printed[address] = connection.description
                print(f"weights go to {address} through {connection.description}", flush=True)
            connection.close()
        self._connections = {}
        return self._sent

    def _send(self, client: ServerClient, info: dict[str, Any], buffer: torch.Tensor) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # of this thread
        try:
            connection = self._connections.get(client.address)
            if connection is None:
                connection = self._connections[client.address] = _Connection(client, self._device)
            connection.send(info, buffer)
        except (RuntimeError, OSError, GroupFailed) as error:
            raise ServerError(
                f"{client.address}: the transfer of weights {info['version']} broke off: {first_line(error)}"
            ) from None

    def _wait(self) -> None:
        loading, self._loading = self._loading, []
        for client, future in loading:
            try:
                # Each wait inside has the same limit. NCCL may need longer, and without end, to connect.
                future.result(timeout=4 * client.timeout_seconds)
            except TimeoutError:
                raise ServerError(
                    f"{client.address}: the transfer of weights {self._header['version']} does not end"
                ) from None


class _Connection:
    """The process group of this rank and the workers of one server. Construction waits for the workers."""

    def __init__(self, client: ServerClient, device: torch.device) -> None:
        self._client = client
        self._seconds = client.timeout_seconds
        self._device = device
        self._host = local_address(*client.host_and_port)
        timeout = datetime.timedelta(seconds=self._seconds)
        self._store = dist.TCPStore(self._host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
        info = GroupInfo(secrets.token_hex(8), self._host, self._store.port, self._seconds)
        self._name = info.group
        joining = in_thread(client.init_weight_transfer, asdict(info))
        with _preferring_failure_of(joining):
            self._group = self._meet(joining)
        joining.result()

    def _meet(self, joining: Future[None]) -> BucketGroup:
        """Wait for all workers, tell them the backend, and return the group."""

        def member(worker: int) -> dict[str, Any]:
            key = f"worker/{worker}"
            wait_until(lambda: self._store.check([key]), lambda: _raise_failure(joining), self._seconds)
            description: dict[str, Any] = json.loads(self._store.get(key))
            return description

        first = member(0)
        workers = [first, *(member(worker) for worker in range(1, first["workers"]))]
        backend, reason = choose_backend(describe_member(self._device), workers)
        self.description = f"{backend} ({reason})"
        self._store.set(BACKEND_KEY, backend)
        return BucketGroup(
            self._store,
            0,
            len(workers) + 1,
            backend=backend,
            device=self._device,
            address=self._host,
            seconds=self._seconds,
        )

    def send(self, info: Mapping[str, Any], buffer: torch.Tensor) -> None:
        """Send one bucket, and wait until the server has loaded the tensors."""
        loading = in_thread(self._client.update_weights, {**info, "group": self._name})
        with _preferring_failure_of(loading):
            self._group.send(buffer, lambda: _raise_failure(loading))
        loading.result()

    def close(self) -> None:
        """Leave the group."""
        self._group.close()


@contextlib.contextmanager
def _preferring_failure_of(call: Future[None]) -> Iterator[None]:
    """Raise the error of a failed call to the server in place of that of a broken connection, which says less."""
    try:
        yield
    except (RuntimeError, OSError):
        wait([call], timeout=FAILURE_SECONDS)
        _raise_failure(call)
        raise


def _raise_failure(call: Future[None]) -> None:
    """Raise the error of a call that has failed. Does nothing while it runs and after a success."""
    if call.done():
        call.result()
