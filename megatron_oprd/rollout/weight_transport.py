"""Transports of weights to servers. The one here writes files into a folder that trainer and servers share."""

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
        """Begin the buckets of this rank for an update with `total_tensors` tensors of all ranks."""
        ...

    def send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Pass one bucket, perhaps before the servers have loaded the one before.

        The tensors may change after the call. Raises ServerError or UserError.
        """
        ...

    def finish(self) -> list[dict[str, Any]]:
        """Wait until all servers have loaded the buckets of this rank.

        Returns: the arguments of `ServerClient.update_weights` that load the buckets again. Raises ServerError.
        """
        ...

    def keep_only(self, version: str) -> None:
        """Forget the buckets of all other versions."""
        ...


class FileTransport:
    """Writes each bucket as a safetensors file, and passes its path to the servers while the next one is written.

    Args:
        folder: a folder that the servers see under the same path; `/dev/shm` is memory.
        rank: the number of this rank; it is part of the names of the files.
    """

    def __init__(self, folder: Path, clients: Sequence[ServerClient], rank: int) -> None:
        self._folder = folder
        self._clients = clients
        self._rank = rank
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
        path = self._version_folder(self._header["version"]) / f"rank{self._rank:05d}-{len(self._sent):05d}.safetensors"
        with explain_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(content, path)
        checksums = {name: checksum(tensor) for name, tensor in content.items()}
        info = {**self._header, "path": str(path), "checksums": checksums}
        self._sent.append(info)
        self._wait()
        self._loading = [self._threads.submit(client.update_weights, info) for client in self._clients]

    def finish(self) -> list[dict[str, Any]]:
        """Wait until all servers have loaded the buckets of this rank, and return their descriptions."""
        self._wait()
        return self._sent

    def keep_only(self, version: str) -> None:
        """Delete the files of other versions, those of all ranks."""
        for folder in self._folder.glob("*"):
            if folder != self._version_folder(version):
                shutil.rmtree(folder, ignore_errors=True)

    def _version_folder(self, version: str) -> Path:
        return self._folder / version.replace(":", "_").replace("/", "_")

    def _wait(self) -> None:
        loading, self._loading = self._loading, []
        for future in loading:
            future.result()
