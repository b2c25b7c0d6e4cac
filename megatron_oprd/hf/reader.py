"""Read the tensors of a Hugging Face checkpoint one at a time."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megatron_oprd.hf.experts import check_one_form, fused_name, fused_shapes, is_fused, single_experts
from megatron_oprd.hf.fp8 import SCALE, STORED_AS, dequantize, scale_shape, weight_block_size
from megatron_oprd.hf.kept import is_kept, looks_kept
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, hf_shapes
from megatron_oprd.hf.weight_files import locate_tensors
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import read_json
from megatron_oprd.types import UserError

(_EMBEDDING,), (_HEAD,) = EMBEDDING.hf, LM_HEAD.hf
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Tensors by which GPTQ, AWQ, bitsandbytes and compressed-tensors replace or accompany a weight.
_QUANTISED = re.compile(r"\.(qweight|qzeros|g_idx|SCB|weight_packed|weight_scale|weight\.(absmax|quant_map))$")

# Beginnings of names under which torch.compile, DDP, FSDP and PEFT save a model.
_WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "base_model.model.")


@dataclass(frozen=True)
class _Place:
    """The place of a tensor of the model in the tensors of the files."""

    stored: str  # name of the tensor that contains this tensor
    expert: int | None = None  # number in a tensor of all experts
    first_row: int = 0
    rows: int | None = None  # None: all


class HFReader:
    """Reads the tensors of a folder with `model.safetensors`, or with an index and its shards. No communication.

    Experts have one tensor each, also if the files have one tensor for all of a layer. FP8 weights are dequantised to
    float32, in which transformers computes the product of weight and scale before it rounds to the model's dtype.

    Raises:
        UserError: a file is missing, truncated or corrupt, experts have two forms, or the weights have an unsupported
            quantisation. Names the file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._opened: dict[str, Any] = {}
        config = self.folder / "config.json"
        self._block = weight_block_size(read_json(config), config) if config.exists() else None
        self._located = locate_tensors(self.folder)
        self._scales = {name for name in self._located if self._block and name.endswith(SCALE)}
        weights = self._located.keys() - self._scales
        check_one_form(weights, self.folder)
        self._fused = {name: self._shape(name) for name in weights if is_fused(name)}
        self._places = {name: _Place(name) for name in weights - self._fused.keys()}
        for name, shape in self._fused.items():
            for single, expert, (start, end) in single_experts(name, shape, self.folder):
                self._places[single] = _Place(name, expert, start, end - start)

    @property
    def quantized(self) -> bool:
        """Return True if the folder has FP8 weights."""
        return bool(self._scales)

    def names(self) -> list[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._places)

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor on the CPU, in the dtype of the file. The file stays open (memory-mapped)."""
        return self._read(self._places[name], 0, self._places[name].rows)

    def read_rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Return the rows from `start` to `end` (exclusive) of a tensor without reading the others."""
        return self._read(self._places[name], start, end)

    def _read(self, place: _Place, start: int, end: int | None) -> torch.Tensor:
        first, last = place.first_row + start, None if end is None else place.first_row + end
        rows: torch.Tensor = self._rows(place.stored, place.expert, first, last)
        if place.stored + SCALE not in self._scales:
            return rows
        assert self._block is not None
        return dequantize(rows, self._rows(place.stored + SCALE, place.expert), self._block, first)

    def _rows(self, stored: str, expert: int | None, start: int = 0, end: int | None = None) -> torch.Tensor:
        if expert is None and (start, end) == (0, None):
            rows: torch.Tensor = self._open(stored).get_tensor(self._located[stored].name)
        else:
            rows = self._slice(stored)[start:end] if expert is None else self._slice(stored)[expert, start:end]
        return rows

    def _open(self, stored: str) -> Any:
        file = self._located[stored].file
        if file not in self._opened:  # opening it for every tensor would take longer than reading the tensor
            self._opened[file] = safe_open(self.folder / file, framework="pt")
        return self._opened[file]

    def _slice(self, stored: str) -> Any:
        return self._open(stored).get_slice(self._located[stored].name)

    def _shape(self, stored: str) -> tuple[int, ...]:
        return tuple(self._slice(stored).get_shape())

    def dtype(self) -> torch.dtype:
        """Return the dtype that represents every tensor exactly: the common dtype, or the widest if they differ.

        FP8 weights do not count: transformers rounds them to the dtype of the others.

        Raises:
            UserError: a tensor is not bfloat16, float16, float32 or FP8 with scales.
        """
        found = {self._dtype(name) for name in sorted(self._located.keys() - self._scales) if not looks_kept(name)}
        dtypes = sorted((dtype for dtype in found if dtype is not None), key=str)
        return functools.reduce(torch.promote_types, dtypes) if dtypes else torch.bfloat16

    def _dtype(self, stored: str) -> torch.dtype | None:
        """Return the dtype of a stored tensor; None for an FP8 weight with scales."""
        dtype = self._slice(stored).get_dtype()
        if stored + SCALE in self._scales:
            if dtype != STORED_AS:
                raise UserError(
                    f"{self.folder}: {stored} has scales, but is stored as {dtype}, not as {STORED_AS}; use the model "
                    "without quantisation"
                )
            return None
        if dtype not in _DTYPES:
            without = " without scales" if self._block else ""
            use = "save it in bfloat16" if dtype == "F64" else "use the model without quantisation, in bfloat16"
            raise UserError(f"{self.folder}: {stored} is stored as {dtype}{without}; {use}, float16 or float32")
        return _DTYPES[dtype]

    def _check_tied_head(self) -> None:
        """Raise UserError if a model with tied embeddings contains another LM head, which transformers would use."""
        if _HEAD not in self._places or _EMBEDDING not in self._places:
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
                bfloat16, float16, float32 or FP8 with scales.
        """
        expected = hf_shapes(spec)
        found = {name for name in self._places if not is_kept(name, spec)}
        if spec.tied_embeddings:
            self._check_tied_head()
            found.discard(_HEAD)
        # First the fused tensors, whose names and shapes an error must show as they are in the files.
        for name, shape in sorted(fused_shapes(spec).items()):
            if name in self._fused:
                self._check_shape(name, shape)
        missing = expected.keys() - found
        if missing == {_HEAD}:
            raise UserError(
                f"{self.folder} holds no {_HEAD}; if it is the embedding, set tie_word_embeddings to true in "
                "config.json"
            )
        quantised = min((name for name in found if _QUANTISED.search(name)), default=None)
        if quantised is not None:
            raise UserError(
                f"{self.folder} holds {quantised}, a tensor of a quantised model, but config.json has no "
                "quantization_config; use the model without quantisation"
            )
        wrapper = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in found)), None)
        if wrapper is not None:
            raise UserError(
                f"{self.folder} holds tensors named {wrapper}..., which were saved from a model inside a wrapper; save "
                "the model itself (of PEFT, after merge_and_unload)"
            )
        for problem, names in (("misses", missing), ("holds unknown", found - expected.keys())):
            if names:
                stored = {fused_name(name) if self._fused else name for name in names}
                raise UserError(
                    f"{self.folder} {problem} {len(stored)} tensors, the first is {min(stored)}; use the config.json "
                    "of these weights, or copy the folder again"
                )
        for name in sorted(expected.keys() & self._places.keys()):
            if (place := self._places[name]).expert is None:
                self._check_shape(name, expected[name])
            self._dtype(place.stored)
        for scale in sorted(self._scales):
            self._check_scale(scale)

    def _check_shape(self, stored: str, expected: tuple[int, ...]) -> None:
        if (shape := self._shape(stored)) != expected:
            raise UserError(
                f"{self.folder}: {stored} has shape {list(shape)}, config.json asks for {list(expected)}; use the "
                "config.json of these weights"
            )

    def _check_scale(self, scale: str) -> None:
        assert self._block is not None
        weight = scale.removesuffix(SCALE)
        if weight not in self._located:
            raise UserError(f"{self.folder} holds {scale}, but not {weight}; copy the folder again")
        if (dtype := self._slice(scale).get_dtype()) not in _DTYPES:
            raise UserError(f"{self.folder}: {scale} is stored as {dtype}; save the scales as {' or '.join(_DTYPES)}")
        self._check_shape(scale, scale_shape(self._shape(weight), self._block))
