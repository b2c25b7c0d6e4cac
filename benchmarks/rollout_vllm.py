"""The vLLM side of `benchmarks/rollout.py`: a server that the benchmark starts and that receives the weights."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.rollout_engines import Generate, Side
from benchmarks.rollout_workloads import Workload
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.server_client import ServerClient, ServerError
from megatron_oprd.rollout.server_pool import ServerPool
from megatron_oprd.rollout.server_process import ManagedServer, ServerSettings, write_model_folder
from megatron_oprd.rollout.server_supervisor import session_processes
from megatron_oprd.rollout.vllm_engine import VllmEngine
from megatron_oprd.rollout.weight_sync import SyncSettings, WeightSync

STALL_SECONDS = 120.0
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class ServerOptions:
    """The settings of the server, which shares the CPU cores or the GPU of the benchmark."""

    python: str  # of the server's environment
    folder: Path  # for configuration and log
    workloads: Sequence[Workload]  # decide the longest sequence and the number of rows
    threads: int  # CPU threads; a GPU server chooses itself
    stack: ExitStack  # ends the server


def vllm_side(stage: Stage, spec: ModelSpec, topology: Topology, options: ServerOptions) -> Side:
    """Start a server with the student's weights and return its side."""
    on_cpu = topology.device.type == "cpu"
    free_before = 0 if on_cpu else torch.cuda.mem_get_info()[0]
    write_model_folder(options.folder, spec)
    threads = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(options.threads)} if on_cpu else {}
    server = ManagedServer(
        ServerSettings(
            python=options.python,
            model=options.folder,
            log=options.folder / "server.log",
            dtype=str(stage.config.params_dtype).removeprefix("torch."),
            max_model_len=max(one.prompt_tokens[1] + one.new_tokens[1] for one in options.workloads),
            memory=0.4,
            max_running=max(one.rows for one in options.workloads),
            environment=threads,
        )
    )
    options.stack.callback(server.stop)
    client = ServerClient(server.start())
    buckets = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    transfer = WeightSync(stage, spec, topology, [client], SyncSettings(buckets, "benchmark"))
    options.stack.callback(transfer.close)
    try:
        transfer.push(0)
    except ServerError:
        print((options.folder / "server.log").read_text()[-8000:], file=sys.stderr)
        raise
    device_bytes = 0 if on_cpu else free_before - torch.cuda.mem_get_info()[0]
    versions = itertools.count(1)

    def prepare(workload: Workload) -> Generate:
        sampling = Sampling(temperature=workload.temperature, max_new_tokens=workload.new_tokens[1])
        pool = ServerPool([client], max_running=workload.rows, stall_seconds=STALL_SECONDS)
        engine = VllmEngine(spec, topology, sampling, transfer, pool, seed=0)
        return lambda prompts, limits: [row.response_ids for row in engine.generate(prompts, 0, limits)]

    def server_bytes() -> int:
        return session_bytes(server.session) if on_cpu else device_bytes

    version = f"{client.version()} with torch {torch_version(options.python)}"
    return Side("vLLM", prepare, version, sync=lambda: transfer.push(next(versions)), server_bytes=server_bytes)


def torch_version(python: str) -> str:
    """Return the version of torch in an environment."""
    command = [python, "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def session_bytes(session: int | None) -> int:
    """Return the bytes of memory of all processes of a session; pages that they share are counted once."""
    processes = [] if session is None else session_processes(session)
    return sum(psutil.Process(process).memory_full_info().pss for process in processes)
