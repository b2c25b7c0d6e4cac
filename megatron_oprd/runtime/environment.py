"""What a run runs on, for its first line and for `environment.json`."""

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
    """What decides how a model can compute here; None for what is not there."""

    transformer_engine: str | None = None  # its version
    capability: tuple[int, int] | None = None  # of the CUDA device
    cuda: tuple[int, int] | None = None  # what torch was built for


def find_machine() -> Machine:
    """The machine that this process runs on. No communication."""
    if not torch.cuda.is_available():
        return Machine(transformer_engine_version())
    cuda = torch.version.cuda
    version = tuple(int(part) for part in cuda.split(".")[:2]) if cuda else (0, 0)
    return Machine(transformer_engine_version(), torch.cuda.get_device_capability(), (version[0], version[1]))


def transformer_engine_version() -> str | None:
    """Of Transformer Engine, where its module can be found too: Megatron-Core takes what it can import."""
    if importlib.util.find_spec("transformer_engine") is None:
        return None
    return _version("transformer-engine")


def describe_environment(device: str, world_size: int, layout: dict[str, int], attention: str) -> dict[str, Any]:
    """Versions of what matters (null: not installed), the machine, the layout and the core attention that was chosen.
    No communication."""
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
    """The start-up line: versions, what was not found, device and layout."""
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
    """The package named apex on PyPI is something else than NVIDIA's: look for what NVIDIA's brings."""
    try:
        import amp_C  # noqa: F401
    except ImportError:
        return False
    return True
