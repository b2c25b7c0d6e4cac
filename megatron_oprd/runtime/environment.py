"""Describe the machine and the installed versions, for the start-up line and `environment.json`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import socket
from dataclasses import dataclass
from typing import Any

import torch

PACKAGES = (
    "torch",
    "megatron-core",
    "transformers",
    "safetensors",
    "numpy",
    "transformer-engine",
    "flash-attn",
    "vllm",
)


@dataclass(frozen=True)
class Machine:
    """The parts of a machine that decide how a model computes. None: not available."""

    transformer_engine: str | None = None  # version
    capability: tuple[int, int] | None = None  # compute capability of the CUDA device
    cuda: tuple[int, int] | None = None  # CUDA version that torch was built for


def find_machine() -> Machine:
    """Return the machine of this process. No communication."""
    if not torch.cuda.is_available():
        return Machine(transformer_engine_version())
    cuda = torch.version.cuda
    version = tuple(int(part) for part in cuda.split(".")[:2]) if cuda else (0, 0)
    return Machine(transformer_engine_version(), torch.cuda.get_device_capability(), (version[0], version[1]))


def transformer_engine_version() -> str | None:
    """Return the version of Transformer Engine, or None.

    The module has to be importable too, because Megatron-Core uses Transformer Engine whenever it can import it.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    return _version("transformer-engine")


def describe_environment(device: str, world_size: int, layout: dict[str, int], attention: str) -> dict[str, Any]:
    """Return the content of `environment.json`: versions, device, layout and core attention. No communication.

    The version of a package that is not installed is None.
    """
    return {
        "megatron_oprd": _version("megatron_oprd") or "source",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "apex": _has_nvidia_apex(),
        "device": device,
        "backend": "nccl" if device.startswith("cuda") else "gloo",
        "attention": attention,
        "world_size": world_size,
        "layout": layout,
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def one_line(environment: dict[str, Any]) -> str:
    """Return the start-up line: versions, missing packages, device and layout."""
    packages = environment["packages"]
    found = [f"{name} {version}" for name, version in packages.items() if version and name in PACKAGES[:3]]
    optional = {**{name: packages[name] for name in PACKAGES[5:7]}, "apex": environment["apex"]}
    extras = [f"{name} {value if isinstance(value, str) else 'found'}" for name, value in optional.items() if value]
    missing = [name for name, value in optional.items() if not value]
    layout = " x ".join(f"{name} {size}" for name, size in environment["layout"].items())
    parts = [*found, *extras, *([f"no {', '.join(missing)}"] if missing else [])]
    attention = f"attention by {environment['attention']}"
    return f"{', '.join(parts)}; {attention}; {environment['device']} with {environment['backend']}; {layout}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_nvidia_apex() -> bool:
    """Return True if NVIDIA's Apex is installed. PyPI has another package with the name apex, so look for a module."""
    try:
        import amp_C  # noqa: F401
    except ImportError:
        return False
    return True
