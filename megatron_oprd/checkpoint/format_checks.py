"""Check a Megatron checkpoint of this package (`megatron_format.py`) before weights are loaded. No communication."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_oprd.checkpoint.stock_names import fused_name
from megatron_oprd.checkpoint.stored_index import COPY_AGAIN, read_index
from megatron_oprd.hf.names import entries, megatron_shapes
from megatron_oprd.hf.weight_files import MANIFEST
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import read_json
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

FORMAT_VERSION = 1
_USE_OWN_CONFIG = "use the config.json of this checkpoint"
# The content of metadata.json. Megatron-Core 0.19 writes the first two keys alone and ignores what it does not know.
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")


def is_megatron_checkpoint(folder: str | Path) -> bool:
    """Return True if a folder contains files of a distributed checkpoint, complete or damaged."""
    folder = Path(folder)
    return any((folder / name).exists() for name in (".metadata", MANIFEST)) or any(folder.glob("*.distcp"))


def check_model(folder: str | Path, spec: ModelSpec) -> None:
    """Raise UserError, with the file or the tensor, for an incomplete checkpoint and for another model's weights.

    Reads the index and the sizes of the files, not the weights. No communication.
    """
    folder = Path(folder)
    if not is_megatron_checkpoint(folder):
        raise UserError(
            f"{folder} is not a Megatron checkpoint: it holds no .distcp files; name a folder that `megatron-oprd "
            "convert` wrote, or `model` in a checkpoint of a run"
        )
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format_version={manifest.get('format_version')!r}, not {FORMAT_VERSION}; convert "
            "the Hugging Face folder again"
        )
    _check_manifest(folder, manifest, spec)
    _check_format(folder)
    stored = {
        name: stored
        for name, stored in check_files(folder).state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    _check_shapes(folder, {name: tuple(tensor.size) for name, tensor in stored.items()}, manifest, spec)
    dtypes = {tensor.properties.dtype for tensor in stored.values()}
    if checkpoint_dtype(folder) not in dtypes:
        raise UserError(
            f"{folder / MANIFEST}: dtype={manifest['dtype']!r}, but the weights are stored as "
            f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}; correct the dtype"
        )


def check_files(folder: Path) -> Metadata:
    """Return the index of a folder that mcore wrote. Raises UserError for missing or truncated files.

    No code that the index or common.pt may contain is run.
    """
    index = read_index(folder)
    # Newer versions of mcore store the common state among the tensors.
    needed = not any(name.startswith("common_state") for name in index.state_dict_metadata)
    if needed or (folder / "common.pt").exists():
        try:
            torch.load(folder / "common.pt", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{folder / 'common.pt'} is missing", COPY_AGAIN) from None
        except Exception:
            raise UserError(f"{folder / 'common.pt'} is truncated or corrupt", COPY_AGAIN) from None
    return index


def checkpoint_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype of the weights in a Megatron checkpoint. Raises UserError for a manifest without a dtype."""
    path = Path(folder) / MANIFEST
    name = read_json(path).get("dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise UserError(f"{path}: dtype={name!r} must be {', '.join(_DTYPES)}; set it to the dtype of the weights")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def describe_damage(error: BaseException) -> str:
    """Describe an exception that torch or mcore raised for a damaged file, in one short line."""
    if isinstance(error, UnpicklingError):  # its text gives advice about torch.load
        return "a .distcp file is corrupt"
    return f"{type(error).__name__}: {error_line(error)}"


def _check_manifest(folder: Path, manifest: dict[str, Any], spec: ModelSpec) -> None:
    """Raise UserError for a manifest that config.json contradicts. The tensors themselves show the number of layers."""
    for key, wanted in (("architecture", spec.architecture), ("vocabulary", spec.vocab_size)):
        if manifest.get(key) != wanted:
            raise UserError(
                f"{folder}: {MANIFEST} has {key}={manifest.get(key)!r}, config.json asks for {wanted!r}; "
                f"{_USE_OWN_CONFIG}"
            )
    padded = manifest.get("padded_vocabulary")
    if type(padded) is not int or padded < spec.vocab_size:
        raise UserError(
            f"{folder / MANIFEST}: padded_vocabulary={padded!r} must be a whole number of at least {spec.vocab_size}, "
            "the vocabulary"
        )


def _check_format(folder: Path) -> None:
    """Raise UserError for a metadata.json that mcore cannot use."""
    path = folder / "metadata.json"
    values = read_json(path)
    if values.get("sharded_backend") != "torch_dist":
        raise UserError(f"{path}: sharded_backend is not torch_dist; convert the Hugging Face folder again")
    for key, value in values.items():
        if value != _FORMAT.get(key):
            raise UserError(f"{path} is corrupt: {key}={value!r}", COPY_AGAIN)


def _check_shapes(folder: Path, shapes: dict[str, tuple], manifest: dict[str, Any], spec: ModelSpec) -> None:
    """Raise UserError for tensors that are missing, unknown, or of another shape than the model's."""
    expected = stored_shapes(spec, manifest["padded_vocabulary"])
    for name, shape in expected.items():
        if name not in shapes:
            raise UserError(f"{folder} misses {name}, which config.json asks for; {_USE_OWN_CONFIG}")
        if shapes[name] != shape:
            raise UserError(
                f"{folder}: {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}; "
                f"{_USE_OWN_CONFIG}"
            )
    unknown = shapes.keys() - expected.keys() - {fused_name(name) for name in expected}
    if unknown:
        raise UserError(
            f"{folder} holds {len(unknown)} unknown tensors, the first is {min(unknown)}; {_USE_OWN_CONFIG}"
        )


def stored_shapes(spec: ModelSpec, padded_vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a checkpoint. The experts of a layer are one stacked tensor."""
    shapes: dict[str, tuple[int, ...]] = {}
    unsharded = megatron_shapes(spec)
    for entry in entries(spec):
        shape = unsharded[entry.megatron]
        if entry.layout == "vocabulary":
            shapes[entry.megatron] = (padded_vocabulary, *shape[1:])
        elif entry.expert is not None:
            stacked = entry.megatron.replace(f".local_experts.{entry.expert}.", ".experts.")
            shapes[stacked] = (spec.num_experts, *shape)
        else:
            shapes[entry.megatron] = shape
    return shapes
