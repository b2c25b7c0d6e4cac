"""Build the vLLM engine of a run: check or start the servers, connect the transfer of the weights."""

from __future__ import annotations

import atexit
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import rollout_sampling
from megatron_oprd.rollout.server_checks import check_server
from megatron_oprd.rollout.server_client import ServerClient, ServerError
from megatron_oprd.rollout.server_pool import Recover, ServerPool
from megatron_oprd.rollout.server_process import START_SECONDS, ManagedServer, ServerSettings, write_model_folder
from megatron_oprd.rollout.vllm_engine import VllmEngine, await_server, is_first_of_replica
from megatron_oprd.rollout.weight_sync import SyncSettings, WeightSync
from megatron_oprd.types import UserError

SHARED_MEMORY = Path("/dev/shm")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class RolloutServers:
    """The servers of a run, which are ready to receive weights."""

    addresses: tuple[str, ...]
    started: ManagedServer | None  # on rank 0, if the run has started its server


def start_servers(inputs: Inputs) -> RolloutServers | None:
    """Check the given servers, or start one. Call it before the models are loaded. Collective over the world.

    Returns: None for another rollout engine.

    Raises:
        UserError: on every rank, if a server does not suit the student or does not start.
    """
    config, started = inputs.config.rollout, []
    if config.engine != "vllm":
        return None

    def start_or_check() -> tuple[str, ...]:
        shutil.rmtree(_sync_folder(inputs), ignore_errors=True)  # of an attempt that was killed
        for address in config.server.addresses:
            check_server(ServerClient(address), inputs.setup.student, inputs.longest_row)
        if config.server.python is None:
            return tuple(config.server.addresses)
        print(f"starting a rollout server; log: {_log(inputs)}", flush=True)
        started.append(_managed_server(inputs))
        return (started[0].start(),)

    addresses = on_rank_zero(start_or_check)
    return RolloutServers(addresses, started[0] if started else None)


def connect_weights(inputs: Inputs, servers: RolloutServers, stage: Stage, topology: Topology) -> WeightSync:
    """Return the transfer of the student's weights to the servers. Collective over the world.

    Args:
        stage: this rank's chunks of the student.
    """
    folder, started = _sync_folder(inputs), servers.started
    sync = WeightSync(
        stage,
        inputs.setup.student,
        topology,
        [ServerClient(address) for address in servers.addresses],
        SyncSettings(folder, folder.name, inputs.config.rollout.server.bucket_bytes),
        None if started is None else partial(_restart, started),
    )
    if topology.rank == 0:
        atexit.register(sync.close)
    return sync


def build_vllm_engine(inputs: Inputs, servers: RolloutServers, sync: WeightSync, topology: Topology) -> VllmEngine:
    """Return the engine that generates with the servers. No communication."""
    config, settings, started = inputs.config, inputs.config.rollout.server, servers.started
    pool = None
    if is_first_of_replica(topology):
        recover: Recover | None = None
        if started is not None:
            recover = partial(_restart_and_reload, started, sync)
        elif settings.python is not None:
            recover = partial(_await_rank_zero, lambda: sync.label)
        # A request beyond what the servers run at once would wait without a token.
        share = max(settings.max_running // topology.num_replicas, 1)
        clients = [ServerClient(address) for address in servers.addresses]
        pool = ServerPool(clients, max_running=share, stall_seconds=settings.stall_seconds, recover=recover)
    return VllmEngine(
        inputs.setup.student,
        topology,
        rollout_sampling(config.rollout),
        sync,
        pool,
        seed=config.train.seed,
        vocab_size=inputs.vocab_size,
    )


def _managed_server(inputs: Inputs) -> ManagedServer:
    config, folder = inputs.config, _sync_folder(inputs)
    settings = config.rollout.server
    assert settings.python is not None
    server = ManagedServer(
        ServerSettings(
            python=settings.python,
            model=folder.with_name(f"{folder.name}_model"),
            log=_log(inputs),
            dtype=DTYPES[config.precision.dtype],
            max_model_len=inputs.longest_row,
            tensor=settings.tensor,
            devices=tuple(settings.devices),
            memory=settings.memory,
            max_running=settings.max_running,
            batch_invariant=settings.batch_invariant,
        )
    )
    write_model_folder(server.settings.model, inputs.setup.student)
    atexit.register(shutil.rmtree, server.settings.model, ignore_errors=True)
    return server


def _sync_folder(inputs: Inputs) -> Path:
    """Return the folder of the buckets. A run that goes on has the same folder, and removes what was left there."""
    run_dir, given = inputs.run_dir.resolve(), inputs.config.rollout.server.sync_dir
    name = hashlib.sha256(str(run_dir).encode()).hexdigest()[:8]
    return Path(given or SHARED_MEMORY).resolve() / f"megatron_oprd_{run_dir.name}_{name}"


def _log(inputs: Inputs) -> Path:
    return inputs.run_dir / "rollout_server.log"


def _restart(server: ManagedServer) -> None:
    server.restart()


def _restart_and_reload(server: ManagedServer, sync: WeightSync, client: ServerClient, problem: str) -> None:
    """Start a failed server again with the weights of the last transfer. Runs in a thread of rank 0."""
    try:
        server.restart()
    except UserError as error:
        raise ServerError(str(error)) from None
    sync.reload(client)


def _await_rank_zero(label: Callable[[], str], client: ServerClient, problem: str) -> None:
    """Wait until rank 0, whose requests fail too, has started the server again."""
    await_server(client, label(), START_SECONDS)
