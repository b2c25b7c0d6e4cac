"""Build the engine of rollout.engine=vllm: its servers, the transfer of weights and the distribution of requests."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_oprd.config.rollouts import RolloutServerConfig
from megatron_oprd.hf.stream import config_with_dtype
from megatron_oprd.launch.inputs import Inputs
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.resilience import process_info
from megatron_oprd.rollout.engine import rollout_sampling
from megatron_oprd.rollout.server_client import ServerClient
from megatron_oprd.rollout.server_keeper import ServerKeeper, ServerRecovery
from megatron_oprd.rollout.server_pool import ServerPool
from megatron_oprd.rollout.server_process import ManagedServer, ServerSettings, write_model_folder
from megatron_oprd.rollout.vllm_engine import VllmEngine, is_first_of_replica
from megatron_oprd.rollout.weight_sync import SyncSettings, WeightSync, weight_bytes
from megatron_oprd.runtime.files import explain_os_errors
from megatron_oprd.types import UserError

SHARED_MEMORY = Path("/dev/shm")
_FOLDER = "megatron_oprd-{user}-{pid}-{token}"
_FOLDER_PATTERN = re.compile(r"megatron_oprd-(\d+)-(\d+)-\w+")


def build_vllm_engine(inputs: Inputs, stage: Stage, topology: Topology) -> VllmEngine:
    """Start or find the servers and return the engine that generates with them. Collective over the world.

    Raises UserError on every rank if a server does not start or does not suit the student.
    """
    config, spec = inputs.config, inputs.setup.student
    server, run_dir = config.rollout.server, inputs.run_dir
    keeper, state = None, run_dir / "rollout_server" / "state.json"
    hosts = set(gather_objects(process_info.host(), dist.group.WORLD))
    addresses: Sequence[str] = server.addresses
    if server.python is not None:
        if len(hosts) > 1:
            raise UserError(
                f"rollout.server.python: a server that the run starts serves one machine, and the run has "
                f"{len(hosts)}; start servers yourself and name them in rollout.server.addresses"
            )
        if topology.rank == 0:
            keeper = _make_keeper(inputs, stage, state)
        addresses = [on_rank_zero(lambda: keeper.start() if keeper else "")]
    clients = [ServerClient(address) for address in addresses]
    folder = _bucket_folder(server, weight_bytes(spec, stage.config.params_dtype), several_hosts=len(hosts) > 1)
    settings = SyncSettings(folder, folder.name.removeprefix("megatron_oprd-"), server.bucket_bytes)
    sync = WeightSync(stage, spec, topology, clients, settings, restart=keeper.restart if keeper else None)
    if topology.rank == 0:
        atexit.register(sync.close)
    if keeper is not None:
        keeper.watch(lambda: sync.reload(clients[0]))
    pool = None
    if is_first_of_replica(topology):
        recover = ServerRecovery(state) if server.python is not None else None
        pool = ServerPool(clients, max_running=server.max_running, stall_seconds=server.stall_seconds, recover=recover)
    sampling = rollout_sampling(config.rollout)
    return VllmEngine(spec, topology, sampling, sync, pool, seed=config.train.seed, vocab_size=inputs.vocab_size)


def _make_keeper(inputs: Inputs, stage: Stage, state: Path) -> ServerKeeper:
    server, dtype = inputs.config.rollout.server, stage.config.params_dtype
    folder, spec = state.parent, inputs.setup.student
    write_model_folder(folder / "model", dataclasses.replace(spec, hf_config=config_with_dtype(spec.hf_config, dtype)))
    settings = ServerSettings(
        server.python or "",
        folder / "model",
        folder / "server.log",
        str(dtype).removeprefix("torch."),
        inputs.lengths.sequence,
        tensor=server.tensor,
        devices=tuple(server.devices),
        memory=server.memory,
        max_running=server.max_running,
        batch_invariant=server.batch_invariant,
    )
    return ServerKeeper(ManagedServer(settings), state)


def _bucket_folder(server: RolloutServerConfig, weight_bytes: int, *, several_hosts: bool) -> Path:
    """Return an empty folder for the weights of this run alone. Collective over the world."""
    if server.sync_dir is None and several_hosts:
        raise UserError(
            "rollout.server.sync_dir: ranks on several machines need a folder that all of them and the servers share"
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
            folder = parent / _FOLDER.format(user=os.getuid(), pid=os.getpid(), token=secrets.token_hex(4))
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
