"""Weights from either kind of folder, and what identifies them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megatron_oprd.checkpoint import megatron_format
from megatron_oprd.hf.load import load_hf
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD
from megatron_oprd.hf.stream import HFReader
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import ModelSpec, UserError

_HASHED = ("*.safetensors", "*.safetensors.index.json", "*.distcp", ".metadata", "config.json")


def load_weights(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology) -> None:
    """Fill a stage from a Hugging Face folder or a Megatron checkpoint, cast to the model's dtype.

    Collective over the world. Raises UserError, naming the folder and what is wrong, on every rank.
    """
    if megatron_format.is_megatron_checkpoint(folder):
        megatron_format.load_model(stage, folder, spec, topology)
        return
    reader = HFReader(folder)
    reader.check(spec)
    load_hf(stage, reader, spec, tensor_rank=topology.tensor_rank, tensor_size=topology.tensor_size)


def load_lm_head(folder: str | Path, spec: ModelSpec, start: int, end: int) -> torch.Tensor:
    """Rows `start` to `end` [rows, hidden] of the LM head in either kind of folder (the embedding, of a tied model), on
    the CPU, in the dtype of the file. No communication. Raises UserError for unreadable files."""
    entry = EMBEDDING if spec.tied_embeddings else LM_HEAD
    if megatron_format.is_megatron_checkpoint(folder):
        return megatron_format.load_parameter(folder, entry.megatron)[start:end]
    (name,) = entry.hf
    return HFReader(folder).read_rows(name, start, end)


def check_weights(folder: str | Path, spec: ModelSpec) -> None:
    """Raise UserError when `load_weights` would: files missing, truncated, or of another model. Reads no weights and
    communicates nothing."""
    if megatron_format.is_megatron_checkpoint(folder):
        megatron_format.check(folder, spec)
    else:
        HFReader(folder).check(spec)


def weights_dtype(folder: str | Path) -> torch.dtype:
    """The dtype in which either kind of folder holds its weights."""
    if megatron_format.is_megatron_checkpoint(folder):
        return megatron_format.checkpoint_dtype(folder)
    return HFReader(folder).dtype()


def content_hash(folder: str | Path) -> str:
    """What identifies the weights of a folder: `sha256:` and 64 hexadecimal digits. No communication.

    SHA-256 over, for each weight file, index and config.json in the order of their names, a line `name size digest`
    with the SHA-256 of all its bytes. It changes with any bit of any weight and stays when the folder is moved or its
    tokenizer changes. It reads everything once (1-2 GB/s): let one rank compute it. The same weights saved again, as
    another kind of folder or in another number of files, have another hash. Raises UserError for unreadable files.
    """
    folder = Path(folder)
    files = sorted({path for pattern in _HASHED for path in folder.glob(pattern) if path.is_file()})
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{path.name} {path.stat().st_size} {digest}\n".encode())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    return f"sha256:{total.hexdigest()}"
