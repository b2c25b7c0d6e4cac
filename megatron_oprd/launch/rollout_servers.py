"""Build the engine of rollout.engine=vllm: its servers, the transfer of weights and the distribution of requests."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_oprd.config.rollouts import RolloutServerConfig
from megatron_oprd.hf.companions import config_with_dtype
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.resilience import process_info
from megatron_oprd.rollout.engine import rollout_sampling
from megatron_oprd.rollout.server_checks import check_server
from megatron_oprd.rollout.server_client import ServerClient
from megatron_oprd.rollout.server_keeper import ServerKeeper, ServerRecovery
from megatron_oprd.rollout.server_pool import ServerPool
from megatron_oprd.rollout.server_process import ManagedServer, ServerSettings, write_model_folder
from megatron_oprd.rollout.vllm_engine import VllmEngine, is_first_of_replica
from megatron_oprd.rollout.weight_sync import SyncSettings, WeightSync, weight_bytes
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.types import UserError

SHARED_MEMORY = Path("/dev/shm")
_LOG = "server.log"
_FOLDER = "megatron_oprd-{run}"
_FOLDER_PATTERN = re.compile(r"megatron_oprd-(\d+)-(\d+)-\w+")


@dataclass(frozen=True)
class RolloutServers:
    """The servers of a run, which are ready to receive weights."""

    addresses: tuple[str, ...]
    run: str  # a name that no other run has
    folder: Path | None  # of the buckets of weights, if they are files
    keeper: ServerKeeper | None  # on rank 0, if the run has started its server


def check_servers(inputs: Inputs) -> ServerKeeper | None:
    """Check the servers given by address, or prepare the start of one. Collective over the world.

    A run calls this before anything else takes time, so that a mistake ends it at once.

    Returns: on rank 0, the keeper of the server that `start_servers` will start; else None.

    Raises:
        UserError: on every rank, if a server does not suit the student.
    """
    config, keeper = inputs.config.rollout, None
    if config.engine != "vllm":
        return None
    hosts = set(gather_objects(process_info.host(), dist.group.WORLD))
    if config.server.python is not None and len(hosts) > 1:
        raise UserError(
            f"rollout.server.python: a server that the run starts serves one machine, and the run has {len(hosts)}; "
            "start servers yourself and name them in rollout.server.addresses"
        )
    for address in config.server.addresses:
        on_rank_zero(lambda address=address: _check_address(inputs, address))
    if config.server.python is not None:

        def prepare() -> None:
            nonlocal keeper
            keeper = _make_keeper(inputs)

        on_rank_zero(prepare)
    return keeper


def start_servers(inputs: Inputs, keeper: ServerKeeper | None) -> RolloutServers | None:
    """Return the servers that `check_servers` has checked; start the one that it has prepared.

    A run calls this before the models are loaded. Collective over the world.

    Returns: None for another rollout engine.

    Raises:
        UserError: on every rank, if the server does not start or the folder of the weights is too small.
    """
    config = inputs.config.rollout
    if config.engine != "vllm":
        return None
    several_hosts = len(set(gather_objects(process_info.host(), dist.group.WORLD))) > 1
    size = weight_bytes(inputs.setup.student, DTYPES[inputs.config.precision.dtype])
    run = on_rank_zero(_make_run_name)
    folder = None
    # A server that the run has started is loaded from copies of the buckets if it ends while it generates.
    if config.server.sync == "file" or config.server.python is not None:
        folder = _bucket_folder(config.server, run, size, several_hosts=several_hosts)
    if config.server.python is None:
        return RolloutServers(tuple(config.server.addresses), run, folder, None)
    if keeper is not None:
        print(f"starting a rollout server; log: {_server_folder(inputs) / _LOG}", flush=True)
    address = on_rank_zero(lambda: keeper.start() if keeper else "")
    return RolloutServers((address,), run, folder, keeper)


def build_vllm_engine(inputs: Inputs, servers: RolloutServers, stage: Stage, topology: Topology) -> VllmEngine:
    """Return the engine that generates with the servers. Collective over the world.

    Args:
        stage: this rank's chunks of the student.
    """
    config, spec, keeper = inputs.config, inputs.setup.student, servers.keeper
    clients = [ServerClient(address) for address in servers.addresses]
    settings = SyncSettings(servers.folder, servers.run, config.rollout.server.bucket_bytes, config.rollout.server.sync)
    sync = WeightSync(stage, spec, topology, clients, settings, restart=keeper.restart if keeper else None)
    if topology.rank == 0:
        atexit.register(sync.close)
    if keeper is not None:
        # A client of its own: until the server is back, the pool closes the connections of the client that failed.
        restarted = ServerClient(servers.addresses[0])
        keeper.watch(lambda: sync.reload(restarted))
    return VllmEngine(
        spec,
        topology,
        rollout_sampling(config.rollout),
        sync,
        _make_pool(inputs, clients, topology) if is_first_of_replica(topology) else None,
        seed=config.train.seed,
        vocab_size=inputs.vocab_size,
    )


def _check_address(inputs: Inputs, address: str) -> None:
    check_server(ServerClient(address), inputs.setup.student, inputs.longest_row)


def _make_pool(inputs: Inputs, clients: list[ServerClient], topology: Topology) -> ServerPool:
    server = inputs.config.rollout.server
    recover = ServerRecovery(_state(inputs)) if server.python is not None else None
    # A request beyond what a server runs at once would wait without a token, and look stalled.
    share = max(server.max_running // topology.num_replicas, 1)
    return ServerPool(clients, max_running=share, stall_seconds=server.stall_seconds, recover=recover)


def _make_keeper(inputs: Inputs) -> ServerKeeper:
    server, dtype = inputs.config.rollout.server, DTYPES[inputs.config.precision.dtype]
    folder, spec = _server_folder(inputs), inputs.setup.student
    write_model_folder(folder / "model", dataclasses.replace(spec, hf_config=config_with_dtype(spec.hf_config, dtype)))
    settings = ServerSettings(
        server.python or "",
        folder / "model",
        folder / _LOG,
        str(dtype).removeprefix("torch."),
        inputs.longest_row,
        tensor=server.tensor,
        devices=tuple(server.devices),
        memory=server.memory,
        max_running=server.max_running,
        batch_invariant=server.batch_invariant,
    )
    managed = ManagedServer(settings)
    managed.check_model(spec)
    return ServerKeeper(managed, _state(inputs))


def _server_folder(inputs: Inputs) -> Path:
    return inputs.run_dir / "rollout_server"


def _state(inputs: Inputs) -> Path:
    """Return the file in which rank 0 tells the other ranks about the server that it has started."""
    return _server_folder(inputs) / "state.json"


def _make_run_name() -> str:
    return f"{os.getuid()}-{os.getpid()}-{secrets.token_hex(4)}"


def _bucket_folder(server: RolloutServerConfig, run: str, weight_bytes: int, *, several_hosts: bool) -> Path:
    """Return an empty folder for the weights of this run alone. Collective over the world."""
    if server.sync_dir is None and several_hosts:
        raise UserError(
            "rollout.server.sync_dir: ranks on several machines need a folder that all of them and the servers "
            "share; name it"
        )
    parent = SHARED_MEMORY if server.sync_dir is None else Path(server.sync_dir)

    def make() -> Path:
        with explain_os_errors(parent):
            parent.mkdir(parents=True, exist_ok=True)
            if server.sync_dir is None:
                _remove_leftovers(parent)
            needed = 2 * weight_bytes
            if (free := shutil.disk_usage(parent).free) < needed:
                raise UserError(
                    f"rollout.server.sync_dir: {parent} has {free / 2**30:.1f} GiB free; two versions of the weights "
                    f"need {needed / 2**30:.1f} GiB; name a larger folder that the servers see too"
                )
            folder = parent / _FOLDER.format(run=run)
            folder.mkdir(mode=0o700)
        return folder

    return on_rank_zero(make)


def _remove_leftovers(parent: Path) -> None:
    """Remove the folders of runs of this user that were killed: shared memory survives its processes."""
    for folder in parent.glob("megatron_oprd-*"):
        match = _FOLDER_PATTERN.fullmatch(folder.name)
        if match and int(match[1]) == os.getuid() and not process_info.is_alive(int(match[2])):
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
