"""Read the tensors of a Hugging Face checkpoint one at a time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, hf_shapes
from megatron_oprd.hf.weight_files import locate_tensors
from megatron_oprd.types import ModelSpec, UserError

(_EMBEDDING,), (_HEAD,) = EMBEDDING.hf, LM_HEAD.hf
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class HFReader:
    """Reads the tensors of a folder with `model.safetensors`, or with an index and its shards. No communication.

    Raises:
        UserError: a file is missing, truncated or corrupt. Names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._shard_of = locate_tensors(self.folder)
        self._opened: dict[str, Any] = {}

    def _names_by_file(self) -> dict[str, list[str]]:
        """Return the tensor names of each file, so that each file is opened once and not once per tensor."""
        names: dict[str, list[str]] = {}
        for name, file in sorted(self._shard_of.items()):
            names.setdefault(file, []).append(name)
        return names

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._shard_of)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype of the file. The file stays open (memory-mapped)."""
        tensor: torch.Tensor = self._open(name).get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return the rows from `start` to `end` (exclusive) of a tensor without reading the others."""
        rows: torch.Tensor = self._open(name).get_slice(name)[start:end]
        return rows

    def _open(self, name: str) -> Any:
        file = self._shard_of[name]
        if file not in self._opened:  # opening it for every tensor would take longer than reading the tensor
            self._opened[file] = safe_open(self.folder / file, framework="pt")
        return self._opened[file]

    def dtype(self) -> torch.dtype:
        """Return the dtype that represents every tensor exactly: the common dtype, or the widest if they differ.

        Raises:
            UserError: a tensor is not bfloat16, float16 or float32.
        """
        found: set[torch.dtype] = set()
        for file, names in self._names_by_file().items():
            with safe_open(self.folder / file, framework="pt") as opened:
                found |= {self._torch_dtype(name, opened.get_slice(name).get_dtype()) for name in names}
        return functools.reduce(torch.promote_types, sorted(found, key=str))

    def _torch_dtype(self, name: str, stored: str) -> torch.dtype:
        if stored not in _DTYPES:
            raise UserError(f"{self.folder}: {name} is stored as {stored}, use one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def _check_tied_head(self) -> None:
        """Raise UserError if a model with tied embeddings contains another LM head, which transformers would use."""
        if _HEAD not in self._shard_of or _EMBEDDING not in self._shard_of:
            return
        if not torch.equal(self.read(_HEAD), self.read(_EMBEDDING)):
            raise UserError(
                f"{self.folder}: config.json says tie_word_embeddings=true, but {_HEAD} differs from {_EMBEDDING}; "
                "transformers uses that LM head: set tie_word_embeddings to false to train it as a model of its own"
            )

    def check(self, spec: ModelSpec) -> None:
        """Check the names, shapes and dtypes of all tensors.

        Raises:
            UserError: a tensor is missing, unknown, of a shape that differs from config.json, or not stored as
                bfloat16, float16 or float32.
        """
        expected = hf_shapes(spec)
        found = set(self._shard_of)
        if spec.tied_embeddings:
            self._check_tied_head()
            found.discard(_HEAD)
        missing = expected.keys() - found
        if missing == {_HEAD}:
            raise UserError(
                f"{self.folder} holds no {_HEAD}; if it is the embedding, set tie_word_embeddings to true in "
                "config.json"
            )
        for problem, names in (("misses", missing), ("holds unknown", found - expected.keys())):
            if names:
                raise UserError(f"{self.folder} {problem} {len(names)} tensors, the first is {min(names)}")
        for file, names_in_file in self._names_by_file().items():
            with safe_open(self.folder / file, framework="pt") as opened:
                for name in (name for name in names_in_file if name in expected):
                    stored, shape = opened.get_slice(name), list(expected[name])
                    self._torch_dtype(name, stored.get_dtype())
                    if stored.get_shape() != shape:
                        actual = stored.get_shape()
                        raise UserError(f"{self.folder}: {name} has shape {actual}, config.json asks for {shape}")
