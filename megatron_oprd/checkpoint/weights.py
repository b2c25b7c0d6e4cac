"""Loading, checking and hashing of weights in a Hugging Face folder or a Megatron checkpoint.

`launch` calls this file for the student and the teachers; `bridge` for the hashes of its models.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from megatron_oprd.checkpoint import megatron_format
from megatron_oprd.hf.load import load_hf
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import ModelSpec, UserError

_HASHED = ("*.safetensors", "*.safetensors.index.json", "*.distcp", ".metadata", "config.json")


def load_weights(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology) -> None:
    """Load the parameters of a stage from a Hugging Face folder or a Megatron checkpoint, cast to the model's dtype.

    Collective over the world. Raises UserError on every rank, with the folder and the cause.
    """
    if megatron_format.is_megatron_checkpoint(folder):
        megatron_format.load_model(stage, folder, spec, topology)
        return
    reader = HFReader(folder)
    reader.check(spec)
    if reader.quantized and topology.rank == 0:  # a stage of another rank may have no parameter
        dtype = str(next(stage.parameters()).dtype).removeprefix("torch.")
        print(f"{folder}: FP8 weights are dequantised to {dtype}", flush=True)
    load_hf(stage, reader, spec, tensor_rank=topology.tensor_rank, tensor_size=topology.tensor_size)


def load_lm_head(folder: str | Path, spec: ModelSpec, start: int, end: int) -> torch.Tensor:
    """Return rows `start` to `end` of the LM head, or of the embedding of a tied model.

    Returns: [end - start, hidden] on the CPU, in the dtype of the file. No communication.
    Raises UserError for unreadable files.
    """
    entry = EMBEDDING if spec.tied_embeddings else LM_HEAD
    if megatron_format.is_megatron_checkpoint(folder):
        return megatron_format.load_parameter(folder, entry.megatron)[start:end]
    (name,) = entry.hf
    return HFReader(folder).read_rows(name, start, end)


def check_weights(folder: str | Path, spec: ModelSpec) -> None:
    """Raise UserError for missing or truncated files and for another model's weights, without loading any weights.

    No communication.
    """
    if megatron_format.is_megatron_checkpoint(folder):
        megatron_format.check_model(folder, spec)
    else:
        HFReader(folder).check(spec)


def weights_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype of the weights in the files."""
    if megatron_format.is_megatron_checkpoint(folder):
        return megatron_format.checkpoint_dtype(folder)
    return HFReader(folder).dtype()


def content_hash(folder: str | Path) -> str:
    """Return a hash of the weights in a folder: `sha256:` and 64 hexadecimal digits. No communication.

    The hash is the SHA-256 over one line `name size digest` for each weight file, index and config.json, in the order
    of their names; `digest` is the SHA-256 of the file. Any changed bit of a weight changes the hash. Moving the folder
    or changing its tokenizer does not. The same weights in another format or another number of files have another hash.
    All files are read once (1-2 GB/s): let one rank compute the hash. Raises UserError for unreadable files.
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
