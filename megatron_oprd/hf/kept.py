"""Tensors of a folder that belong to no layer that is trained: the vision tower, and layers that predict more tokens.

They are kept aside and written to each export bit for bit, so that the folder opens as before. A Megatron checkpoint
has them in files of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_oprd.hf.weight_files import MANIFEST, locate_tensors
from megatron_oprd.model_spec import ModelSpec

_KEPT = re.compile(r"(mtp|model\.visual)\.")
_FILES = "kept_tensors-{number:05d}.safetensors"
_MOST_BYTES = 5_000_000_000  # of one file


def is_kept(name: str, spec: ModelSpec) -> bool:
    """Return True if a tensor of this model's folder is kept aside."""
    return spec.delta_net is not None and looks_kept(name)


def looks_kept(name: str) -> bool:
    """Return True for the name of a tensor that a model with Gated DeltaNet keeps aside."""
    return _KEPT.match(name) is not None


def kept_tensors(folder: str | Path, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the kept tensors of a Hugging Face folder or a Megatron checkpoint, with their names in the files."""
    folder = Path(folder)
    if spec.delta_net is None:
        return
    if (folder / MANIFEST).exists():
        for path in sorted(folder.glob(_FILES.replace("{number:05d}", "*"))):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        return
    by_file: dict[str, list[str]] = {}
    for name, place in locate_tensors(folder).items():
        if looks_kept(name):
            by_file.setdefault(place.file, []).append(place.name)
    for path, names in by_file.items():
        with safe_open(folder / path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)


def copy_kept(source: str | Path, target: Path, spec: ModelSpec) -> None:
    """Copy the kept tensors of a folder to the Megatron checkpoint `target`. Raises OSError."""
    pending: dict[str, torch.Tensor] = {}
    number = 0

    def write() -> None:
        nonlocal pending, number
        number += 1
        save_file(pending, target / _FILES.format(number=number), metadata={"format": "pt"})
        pending = {}

    for name, tensor in kept_tensors(source, spec):
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > _MOST_BYTES:
            write()
        pending[name] = tensor
    if pending:
        write()
