"""Read the index `.metadata` of a folder in mcore's `torch_dist` format, and check that the files hold what it lists.

The index is a pickle, which can contain code. Only the classes of which torch writes an index are loaded here. torch
and mcore load the file again without that limit, so call `read_index` first.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

INDEX = ".metadata"
COPY_AGAIN = "copy the whole folder again"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # The plans of all ranks, which mcore keeps in the index.
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict", "defaultdict"},
    "builtins": {"set", "frozenset"},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},  # Python 3.13
}


class _IndexUnpickler(pickle.Unpickler):
    """Loads the classes of an index and dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no index contains")


def read_index(folder: Path) -> Metadata:
    """Return the index of a folder. No code that a damaged or hostile index contains is run.

    Raises UserError, with the file, if the index is missing or damaged, names files outside of the folder, does not
    list every part of a tensor, or lists more bytes than a file has.
    """
    path = folder / INDEX
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        problem = _find_problem(index)
    except FileNotFoundError:
        raise UserError(f"{path} is missing", COPY_AGAIN) from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path} is truncated or corrupt: {error_line(error)}", COPY_AGAIN) from None
    if problem:
        raise UserError(f"{path} is corrupt: {problem}", COPY_AGAIN)
    _check_files(folder, index)
    return index


def _find_problem(index: Any) -> str | None:
    """Return what contradicts itself in an index, or None. Raises any exception for values of other types."""
    if not isinstance(index, Metadata):
        return f"it holds a {type(index).__name__}"
    stored = {(place.fqn, None if place.offset is None else tuple(place.offset)) for place in index.storage_data}
    for place in index.storage_data.values():
        if not isinstance(place, filesystem._StorageInfo) or min(place.offset, place.length) < 0:
            return "a part of a file has no valid place"
        if PurePath(place.relative_path).name != place.relative_path:
            return f"it names {place.relative_path!r}, which is not a file of the folder"
    for name, tensor in index.state_dict_metadata.items():
        if isinstance(tensor, BytesStorageMetadata):
            continue
        if not isinstance(tensor, TensorStorageMetadata) or not isinstance(tensor.properties.dtype, torch.dtype):
            return f"{name} is no tensor"
        parts = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
        if not all(_is_inside(*part, tuple(tensor.size)) for part in parts):
            return f"a part of {name} lies outside of the tensor"
        if sum(math.prod(sizes) for _, sizes in parts) != math.prod(tensor.size):
            return f"the parts of {name} are not the complete tensor"
        if not {(name, offsets) for offsets, _ in parts} <= stored:
            return f"a part of {name} is in no file"
    return None


def _is_inside(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(offsets) == len(sizes) == len(shape) and all(
        start >= 0 and size >= 0 and start + size <= length
        for start, size, length in zip(offsets, sizes, shape, strict=True)
    )


def _check_files(folder: Path, index: Metadata) -> None:
    """Raise UserError for a file of the index that is missing or shorter than the index says."""
    sizes: dict[str, int] = {}
    for stored in index.storage_data.values():
        sizes[stored.relative_path] = max(sizes.get(stored.relative_path, 0), stored.offset + stored.length)
    for file, size in sorted(sizes.items()):
        if not (folder / file).is_file():
            raise UserError(f"{folder / file} is missing", COPY_AGAIN)
        if (folder / file).stat().st_size < size:
            raise UserError(
                f"{folder / file} is truncated: {(folder / file).stat().st_size} of {size} bytes", COPY_AGAIN
            )
