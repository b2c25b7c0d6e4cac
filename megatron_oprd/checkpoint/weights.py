"""Loading, checking and hashing of weights in a Hugging Face folder or a Megatron checkpoint.

A Megatron checkpoint is one of this package (`megatron_format.py`) or of Megatron-LM and Megatron-Bridge
(`megatron_lm.py`).

`launch` calls this file for the student and the teachers; `bridge` for the hashes of its models.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path

import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_oprd.checkpoint import format_checks, megatron_format, megatron_lm
from megatron_oprd.hf.load import load_hf, named_parameters, parameter_table, reading_threads
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import UserError

_HASHED = ("*.safetensors", "*.safetensors.index.json", "*.distcp", ".metadata", "config.json")


def load_weights(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology) -> None:
    """Load the parameters of a stage from a Hugging Face folder or a Megatron checkpoint, cast to the model's dtype.

    Collective over the world. Raises UserError on every rank, with the folder and the cause, also for weights that are
    NaN or infinite in that dtype.
    """
    if megatron_lm.is_megatron_lm(folder):
        megatron_format.fill_stage(stage, topology, folder, _open_checked(folder, spec).load)
    elif format_checks.is_megatron_checkpoint(folder):
        megatron_format.load_model(stage, folder, spec, topology)
    else:
        _load_hf_folder(stage, folder, spec, topology)
    on_every_rank(lambda: _check_finite(stage, folder, spec))


def _load_hf_folder(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology) -> None:
    reader = HFReader(folder)
    reader.check(spec)
    if reader.quantized and topology.rank == 0:  # a stage of another rank may have no parameter
        dtype = str(next(stage.parameters()).dtype).removeprefix("torch.")
        print(f"{folder}: FP8 weights are dequantised to {dtype}", flush=True)
    load_hf(stage, reader, spec, tensor_rank=topology.tensor_rank, tensor_size=topology.tensor_size)


def _check_finite(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec) -> None:
    """Raise UserError if a parameter of this rank is not finite. FP8 parameters are not looked at."""
    parameters = {name: one.detach() for name, one in named_parameters(stage).items() if not is_float8tensor(one)}
    if not parameters:
        return
    # A sum needs no memory. Only a sum of huge weights can be infinite although every weight is finite.
    sums = torch.stack([one.sum(dtype=torch.float32) for one in parameters.values()]).isfinite().tolist()
    for (name, parameter), finite in zip(parameters.items(), sums, strict=True):
        if not finite and (count := int((~parameter.isfinite()).sum())):
            raise UserError(
                f"{folder}: {count} of {parameter.numel()} weights of {', '.join(parameter_table(spec)[name].hf)} are "
                f"NaN or infinite in {str(parameter.dtype).removeprefix('torch.')}; copy the folder again, or use a "
                "checkpoint from before the training failed"
            )


def load_lm_head(folder: str | Path, spec: ModelSpec, start: int, end: int) -> torch.Tensor:
    """Return rows `start` to `end` of the LM head, or of the embedding of a tied model.

    Returns: [end - start, hidden] on the CPU, in the dtype of the file. No communication.
    Raises UserError for unreadable files.
    """
    entry = EMBEDDING if spec.tied_embeddings else LM_HEAD
    if megatron_lm.is_megatron_lm(folder):
        stored = megatron_lm.open_model(folder)
        tensor = megatron_format.read_tensor(stored.folder, entry.megatron, stored.tensors[entry.megatron])
        return tensor[start:end]
    if format_checks.is_megatron_checkpoint(folder):
        return megatron_format.load_parameter(folder, entry.megatron)[start:end]
    (name,) = entry.hf
    return HFReader(folder).read_rows(name, start, end)


def check_weights(folder: str | Path, spec: ModelSpec) -> None:
    """Raise UserError for missing or truncated files and for another model's weights, without loading any weights.

    No communication.
    """
    if megatron_lm.is_megatron_lm(folder):
        _open_checked(folder, spec)
    elif format_checks.is_megatron_checkpoint(folder):
        format_checks.check_model(folder, spec)
    else:
        HFReader(folder).check(spec)


def weights_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype of the weights in the files."""
    if megatron_lm.is_megatron_lm(folder):
        return megatron_lm.open_model(folder).dtype
    if format_checks.is_megatron_checkpoint(folder):
        return format_checks.checkpoint_dtype(folder)
    return HFReader(folder).dtype()


def _open_checked(folder: str | Path, spec: ModelSpec) -> megatron_lm.StoredModel:
    stored = megatron_lm.open_model(folder)
    stored.check(format_checks.stored_shapes(spec, spec.vocab_size), spec)
    return stored


def content_hash(folder: str | Path) -> str:
    """Return a hash of the weights in a folder: `sha256:` and 64 hexadecimal digits. No communication.

    All files are read once (1-2 GB/s): let one rank compute the hash. Raises UserError for unreadable files.
    """
    return WeightHashes([folder]).of(folder)


class WeightHashes:
    """The hashes of the weights in model folders. Threads compute each hash once, while the models are built.

    A hash is the SHA-256 over one line `name size digest` for each weight file, index and config.json, in the order
    of their names; `digest` is the SHA-256 of the file. Any changed bit of a weight changes the hash. Moving the folder
    or changing its tokenizer does not. The same weights in another format or another number of files have another hash.
    No hash is kept for the next start: size and time of a file can be equal after its weights were exchanged
    (`cp -p`, `rsync -t`), and reading the weights takes as long as hashing them.
    """

    def __init__(self, folders: Iterable[str | Path]) -> None:
        """Start to hash the files of all folders. Give folders on one rank alone. No communication."""
        self._lines: dict[Path, list[Future[str]]] = {}
        tasks: list[tuple[Path, Future[str]]] = []
        for folder in {Path(one) for one in folders}:
            place = megatron_lm.iteration_folder(folder) if megatron_lm.is_megatron_lm(folder) else folder
            files = sorted({path for pattern in _HASHED for path in place.glob(pattern) if path.is_file()})
            self._lines[folder] = [Future() for _ in files]
            tasks += zip(files, self._lines[folder], strict=True)
        tasks.sort(key=lambda task: task[0].stat().st_size, reverse=True)
        remaining = iter(tasks)
        for _ in range(min(reading_threads(), len(tasks))):
            # A daemon: a run that is refused meanwhile does not wait for the hashes.
            threading.Thread(target=_hash_files, args=(remaining,), daemon=True).start()

    def of(self, folder: str | Path) -> str:
        """Wait for the hash of a folder and return it. Raises UserError for unreadable files."""
        total = hashlib.sha256()
        for line in self._lines[Path(folder)]:
            total.update(line.result().encode())
        return f"sha256:{total.hexdigest()}"


def _hash_files(tasks: Iterator[tuple[Path, Future[str]]]) -> None:
    """Hash files until none is left. Each future gets the line of its file, or the error."""
    for path, line in tasks:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            line.set_result(f"{path.name} {path.stat().st_size} {digest}\n")
        except OSError as error:
            line.set_exception(UserError(f"cannot read {path}: {error.strerror}; check its permissions and the disk"))
        except BaseException as error:
            line.set_exception(error)
