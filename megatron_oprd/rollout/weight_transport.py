"""The interface of weight transports, and the transport that writes files into a folder shared with the servers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.buckets import checksum
from megatron_oprd.rollout.server_client import ServerClient
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import explain_os_errors


class WeightTransport(Protocol):
    """Passes buckets of complete tensors from this rank to every server. Each rank that has weights uses its own."""

    def start(self, version: str, total_tensors: int) -> None:
        """Begin the buckets of this rank for an update with `total_tensors` tensors of all ranks. Raises UserError."""
        ...

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pass one bucket, perhaps before the servers have loaded the one before.

        The tensors may change after the call. Raises ServerError or UserError.
        """
        ...

    def finish(self) -> list[dict[str, Any]]:
        """Wait until all servers have loaded the buckets of this rank.

        Returns: the arguments of `ServerClient.update_weights` that load the buckets again; nothing, if a server that
        fails is not started again. Raises ServerError.
        """
        ...


class BucketFiles:
    """The bucket files of one rank.

    Args:
        folder: a folder that the servers see under the same path; `/dev/shm` is memory.
        rank: the number of this rank; it is part of the names of the files.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._rank = rank

    def path(self, version: str, number: int) -> Path:
        """Return the path of a bucket of this rank."""
        return self._version_folder(version) / f"rank{self._rank:05d}-{number:05d}.safetensors"

    def write(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a bucket. The file appears when it is complete. Raises UserError."""
        partial = path.with_suffix(".partial")
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(dict(tensors), partial)
            partial.replace(path)

    def keep_only(self, version: str) -> None:
        """Delete the files of other versions, those of all ranks."""
        for folder in self._folder.glob("*"):
            if folder != self._version_folder(version):
                shutil.rmtree(folder, ignore_errors=True)

    def _version_folder(self, version: str) -> Path:
        return self._folder / version.replace(":", "_").replace("/", "_")


class FileTransport:
    """Writes each bucket as a safetensors file, and passes its path to the servers while the next one is written."""

    def __init__(self, files: BucketFiles, clients: Sequence[ServerClient]) -> None:
        self._files = files
        self._clients = clients
        self._threads = ThreadPoolExecutor(max_workers=max(len(clients), 1), thread_name_prefix="weights")
        self._loading: list[Future[None]] = []
        self._sent: list[dict[str, Any]] = []
        self._header: dict[str, Any] = {}

    def start(self, version: str, total_tensors: int) -> None:
        """Begin the buckets of this rank."""
        self._header = {"version": version, "total_tensors": total_tensors}
        self._sent, self._loading = [], []

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one bucket, wait until the bucket before is loaded, and let the servers load this one."""
        progress.beat()
        content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        path = self._files.path(self._header["version"], len(self._sent))
        self._files.write(path, content)
        checksums = {name: checksum(tensor) for name, tensor in content.items()}
        info = {**self._header, "path": str(path), "checksums": checksums}
        self._sent.append(info)
        self._wait()
        self._loading = [self._threads.submit(client.update_weights, info) for client in self._clients]

    def finish(self) -> list[dict[str, Any]]:
        """Wait until all servers have loaded the buckets of this rank, and return their descriptions."""
        self._wait()
        return self._sent

    def _wait(self) -> None:
        loading, self._loading = self._loading, []
        for future in loading:
            future.result()
