"""Bring the student's weights to the rollout servers, and prove that the servers generate with them."""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_oprd.hf.export import HFTensorStream
from megatron_oprd.hf.names import hf_shapes
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.canary import TOLERANCES, ScoredTokens, largest_difference, score_by_server, score_by_student
from megatron_oprd.rollout.group_transport import GroupTransport
from megatron_oprd.rollout.server_client import ServerClient, ServerError
from megatron_oprd.rollout.weight_transport import BucketFiles, FileTransport, WeightTransport
from megatron_oprd.types import UserError


class SyncFailed(ServerError):
    """The servers did not get the weights, or do not compute with them. Every rank raises this."""


@dataclass(frozen=True)
class SyncSettings:
    """The options of the transfer of weights."""

    folder: Path | None  # shared with the servers under the same path; belongs to this run alone
    run: str  # name of the run, the first part of a weight version
    bucket_bytes: int = 256 * 1024**2  # weights that are transferred at once
    transport: Literal["file", "nccl"] = "file"  # files in `folder`, or process groups with copies in `folder`, if any


class WeightSync:
    """Transfers the weights of a student in any layout to servers, bucket by bucket, and checks the result.

    Every rank that has the first replica of a parameter writes it: each pipeline stage and each group of experts has
    its own writers, which work at the same time. Tensors have the names and shapes of the Hugging Face export.
    The buckets of the last complete update are kept as files, so that a server that was restarted can load them.

    Construction is collective over the world.

    Args:
        stage: this rank's chunks of the student.
        clients: the servers. Every rank that writes must reach them.
        settings: the folder and the size of the buckets.
        restart: starts all servers anew under their addresses, called on rank 0; None: a failure ends the run.
    """

    def __init__(
        self,
        stage: Stage,
        spec: ModelSpec,
        topology: Topology,
        clients: Sequence[ServerClient],
        settings: SyncSettings,
        restart: Callable[[], None] | None = None,
    ) -> None:
        self._stage, self._spec, self._topology = stage, spec, topology
        self._clients = clients
        self._settings = settings
        self._restart = restart
        self._stream = HFTensorStream(stage, spec, topology)
        self._files = None if settings.folder is None else BucketFiles(settings.folder, topology.rank)
        self._transport = self._make_transport()
        self._kept: list[dict[str, Any]] = []  # descriptions of the buckets of all ranks
        self._reference: list[ScoredTokens] = []  # the student's log-probabilities in the last canary
        self.label = ""  # weight version of the last complete update

    def push(self, version: int) -> dict[str, float]:
        """Transfer the present weights to all servers and compare log-probabilities of fixed tokens.

        A server waits for its running requests, loads the buckets, forgets the keys and values of old weights and
        continues. Nothing else may use it meanwhile. Collective over the world.

        Args:
            version: number of updates that the weights have seen.

        Returns: `sync/seconds`, `sync/bytes` of the weights and `sync/canary_difference` in nats, equal on every rank.

        Raises:
            SyncFailed: on every rank, also after a restart of the servers. They may be in the middle of an update.
            UserError: on every rank, if the folder cannot be written.
        """
        start = time.monotonic()
        self._stage.wait_for_parameters()
        label = f"{self._settings.run}:{version}"
        try:
            difference = self._push(label)
        except SyncFailed as error:
            if self._restart is None:
                raise
            if self._topology.rank == 0:
                print(f"warning: {error}; starting the rollout servers again", file=sys.stderr, flush=True)
            self._on_rank_zero(self._restart)
            difference = self._push(label)
        size = weight_bytes(self._spec, self._dtype)
        seconds = self._on_rank_zero(lambda: time.monotonic() - start)
        return {"sync/seconds": seconds, "sync/bytes": float(size), "sync/canary_difference": difference}

    def reload(self, client: ServerClient) -> None:
        """Load the weights of the last `push` into a server that was restarted. No communication between ranks.

        Raises:
            ServerError: the server fails, or computes other log-probabilities than the student did after that `push`.
        """
        if not self._kept:
            raise ServerError(f"{client.address}: there are no files with the weights of the last transfer")
        _open_update(client)
        for info in self._kept:
            _wait_for_file(Path(info["path"]), client)
            client.update_weights(info)
        _close_update(client, self.label)
        self._compare(client, score_by_server(client, self._spec.vocab_size), self._reference, self.label)

    def _push(self, label: str) -> float:
        """Transfer the weights once and return the difference that the canary found."""
        self._on_rank_zero(lambda: [_open_update(client) for client in self._clients])
        gathered = self._agree(*self._write(label))
        self._on_rank_zero(lambda: [_close_update(client, label) for client in self._clients])
        difference = self._check_canary(label)
        self._kept = [info for infos in gathered for info in infos]
        self.label = label
        if self._files is not None:
            self._on_rank_zero(partial(self._files.keep_only, label))
        return difference

    def _check_canary(self, label: str) -> float:
        """Compare each server's log-probabilities of fixed tokens with the student's. Collective over the world.

        Returns: the largest difference in nats. Raises SyncFailed on every rank if it exceeds the tolerance.
        """
        scored: list[list[ScoredTokens]] = self._on_rank_zero(
            lambda: [score_by_server(client, self._spec.vocab_size) for client in self._clients]
        )
        # Servers with equal weights may differ in an answer whose best tokens are equally likely.
        distinct = {one.token_ids: one for server in scored for one in server}
        by_student = score_by_student(self._stage, self._spec, self._topology, list(distinct))
        self._reference = [
            dataclasses.replace(one, logprobs=tuple(logprobs))
            for one, logprobs in zip(distinct.values(), by_student, strict=True)
        ]
        # Replicas may compute slightly different values; rank 0 decides.
        differences: list[float] = self._on_rank_zero(
            lambda: [
                self._compare(client, server, self._reference, label)
                for client, server in zip(self._clients, scored, strict=True)
            ]
        )
        return max(differences)

    def _compare(
        self, client: ServerClient, server: Sequence[ScoredTokens], student: Sequence[ScoredTokens], label: str
    ) -> float:
        difference = largest_difference(server, student)
        tolerance = TOLERANCES[self._dtype]
        if not difference <= tolerance:  # also if it is not a number
            raise ServerError(
                f"{client.address}: canary: after the transfer of weights {label}, the log-probabilities of fixed "
                f"tokens differ from the student's by {difference:.3g} nats, more than {tolerance:g}: the server does "
                "not compute with the student's weights"
            )
        return difference

    def close(self) -> None:
        """Delete the folder of the buckets. Call it on one rank when the servers have ended."""
        if self._settings.folder is not None:
            shutil.rmtree(self._settings.folder, ignore_errors=True)

    def _make_transport(self) -> WeightTransport:
        if self._settings.transport == "nccl":
            rank, device = self._topology.rank, self._topology.device
            return GroupTransport(self._files, self._clients, device, verbose=rank == 0)
        assert self._files is not None, "files need a folder"
        return FileTransport(self._files, self._clients)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._stage.config.params_dtype
        return dtype

    def _write(self, label: str) -> tuple[list[dict[str, Any]], Exception | None]:
        """Send this rank's tensors. Return an error instead of raising it: other ranks wait for this rank's part."""
        tensors = self._stream.gather()
        try:
            self._transport.start(label, len(hf_shapes(self._spec)))
            for bucket in _buckets(tensors, self._dtype, self._settings.bucket_bytes):
                self._transport.send(bucket)
            return self._transport.finish(), None
        except (ServerError, UserError) as error:
            for _ in tensors:
                pass
            return [], error

    def _on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 and return its result on every rank."""
        result, error = None, None
        if self._topology.rank == 0:
            try:
                result = function()
            except (ServerError, UserError) as problem:
                error = problem
        return self._agree(result, error)[0]

    def _agree(self, result: Any, error: Exception | None) -> list[Any]:
        """Return the results of all ranks. Raises on every rank if one has an error."""
        gathered = gather_objects((result, error and (isinstance(error, UserError), str(error))), dist.group.WORLD)
        for _, failure in gathered:
            if failure:
                by_user, message = failure
                if not by_user:
                    raise SyncFailed(message)
                shared = UserError(message)
                shared.everywhere = True
                raise shared
        return [value for value, _ in gathered]


def weight_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Return the bytes of all tensors that a transfer sends."""
    return sum(math.prod(shape) for shape in hf_shapes(spec).values()) * dtype.itemsize


def _open_update(client: ServerClient) -> None:
    client.pause()
    client.start_weight_update()


def _close_update(client: ServerClient, label: str) -> None:
    client.finish_weight_update(label)
    client.reset_prefix_cache()
    client.resume()
    if (found := client.weight_info()) != label:
        raise ServerError(f"{client.address}: reports weights {found} after the transfer of {label}")


def _wait_for_file(path: Path, client: ServerClient) -> None:
    """Wait for a file that another rank may still be writing. Raises ServerError."""
    deadline = time.monotonic() + client.timeout_seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise ServerError(f"{client.address}: {path} is missing: the weights cannot be loaded again")
        time.sleep(0.1)


def _buckets(
    tensors: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype, bucket_bytes: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield consecutive tensors, cast to `dtype`, in dicts of at most `bucket_bytes` or one tensor."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        tensor = tensor.to(dtype)
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor
        size += tensor.nbytes
    if bucket:
        yield bucket
