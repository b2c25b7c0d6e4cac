"""Weights of a model as a Megatron-Core distributed checkpoint, readable by any parallel layout.

The folder holds mcore's files (`*.distcp`, `.metadata`, `metadata.json`, `common.pt`), the Hugging Face files beside
the weights (config.json, tokenizer, chat template, ...), so that everything that reads those works on it too, and
`megatron_oprd.json`. Every layer is a tensor of its own (`decoder.layers.3.mlp.linear_fc1.weight`): a model that is
cut above some layer, or that has no LM head, reads just what it has. The experts of a layer are one tensor
(`decoder.layers.3.mlp.experts.experts.linear_fc1.weight`, experts first), of which each rank writes and reads its own.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_oprd.checkpoint.sharded_write import PlannedWrite, plan_write
from megatron_oprd.hf.config import read_json
from megatron_oprd.hf.load import global_name, named_parameters
from megatron_oprd.hf.names import entries, megatron_shapes, padded_vocab_size
from megatron_oprd.hf.stream import config_with_dtype, copy_companions
from megatron_oprd.parallel.rank_zero import on_every_rank, on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import commit_partial, discard_partial, explain_os_errors, prepare_partial, write_json
from megatron_oprd.types import ModelSpec, UserError

MANIFEST = "megatron_oprd.json"
FORMAT_VERSION = 1


def sharded_weights(stage: torch.nn.ModuleList, topology: Topology) -> dict[str, Any]:
    """mcore's sharded state dict of all chunks of a stage, by the parameters' names in the whole model, a tensor for
    each layer, without the modules' extra states.

    An extra state is empty without Transformer Engine; leaving it out keeps the files independent of the layer spec.
    """
    metadata = {"non_homogeneous_layers": True, "dp_cp_group": topology.groups.dp_cp}
    return {
        global_name(name, chunk.first_layer, chunk.first_expert): value
        for chunk in stage
        for name, value in chunk.sharded_state_dict(metadata=metadata).items()
        if not name.endswith("_extra_state")
    }


def save_model(
    stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology, source: str | Path
) -> None:
    """Write the weights of all ranks to the new folder, in the model's dtype, with the companions of `source`.

    Collective over the world, on a file system that all ranks share. The folder appears when it is whole. Raises
    UserError on every rank for a folder that holds something and for a disk that does not take it.
    """
    partial = on_rank_zero(lambda: prepare_partial(folder))
    try:
        with explain_os_errors(partial):
            weights = plan_model(stage, partial, topology)
            weights.write()
            weights.finish()

        def commit() -> None:
            describe_model(stage, partial, spec, topology, source)
            commit_partial(folder)

        on_rank_zero(commit)
    except BaseException:
        if topology.rank == 0:
            discard_partial(folder)
        raise


def plan_model(stage: torch.nn.ModuleList, folder: str | Path, topology: Topology) -> PlannedWrite:
    """Plan to write the weights of all ranks into the empty `folder`. Collective over the world; raises what mcore,
    torch and the disk raise."""
    return plan_write(sharded_weights(stage, topology), folder)


def describe_model(
    stage: torch.nn.ModuleList, folder: Path, spec: ModelSpec, topology: Topology, source: str | Path
) -> None:
    """Put beside the weights what says whose they are: the companions of `source`, config.json, the manifest. One rank
    calls it. Raises UserError for a disk that does not take it."""
    dtype = next(stage.parameters()).dtype
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": spec.architecture,
        "num_layers": spec.num_layers,
        "vocabulary": spec.vocab_size,
        "padded_vocabulary": padded_vocab_size(spec, topology.tensor_size),
    }
    with explain_os_errors(folder):
        copy_companions(Path(source), folder)
    write_json(folder / "config.json", config_with_dtype(spec.hf_config, dtype))
    write_json(folder / MANIFEST, manifest)


def is_megatron_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds the files of a distributed checkpoint, whole or broken."""
    folder = Path(folder)
    return any((folder / name).exists() for name in (".metadata", MANIFEST)) or any(folder.glob("*.distcp"))


def checkpoint_dtype(folder: str | Path) -> torch.dtype:
    """The dtype of the weights in a Megatron checkpoint. Raises UserError for a folder that does not say."""
    name = read_json(Path(folder) / MANIFEST).get("dtype")
    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"{Path(folder) / MANIFEST}: dtype={name!r} is not a dtype")
    return dtype


def load_model(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology) -> None:
    """Fill every parameter of a stage, cast to the parameter's dtype. `spec` is the whole model's; this one may be cut
    above a layer or lack the LM head.

    Collective over the world; every rank reads its part. Raises UserError on every rank, naming the file or the
    tensor, for a folder that is not whole or does not hold this model.
    """
    folder = Path(folder)
    check(folder, spec)

    def read() -> dict[str, Any]:
        try:
            return dist_checkpointing.load(sharded_weights(stage, topology), str(folder))
        except checkpoint.api.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UserError(f"{folder} cannot be read (rank {rank}): {describe_damage(cause)}") from None
        except dist_checkpointing.core.CheckpointingException as error:
            raise UserError(f"{folder} cannot be read: {error}") from None

    loaded = on_every_rank(read)  # not every version of mcore tells all ranks what one of them met
    with torch.no_grad():
        for name, parameter in named_parameters(stage).items():
            # mcore reads into the parameter itself, except where it lays a parameter together from pieces, and never in
            # FP8: that is made of what was read.
            if is_float8tensor(parameter) or loaded[name].data_ptr() != parameter.data_ptr():
                parameter.copy_(loaded[name])


def load_parameter(folder: str | Path, name: str) -> torch.Tensor:
    """One whole parameter of a Megatron checkpoint, on the CPU, in the dtype of the file. No communication. Raises
    UserError, naming the folder, for a damaged one."""
    folder = Path(folder)
    stored = check_files(folder).state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    parameter = torch.empty(stored.size, dtype=stored.properties.dtype)
    try:
        checkpoint.load({name: parameter}, storage_reader=FileSystemReader(folder), no_dist=True)
    except checkpoint.api.CheckpointException as error:
        raise UserError(f"{folder} cannot be read: {describe_damage(next(iter(error.failures.values()))[0])}") from None
    return parameter


def describe_damage(error: BaseException) -> str:
    """In a few words what torch or mcore raised on reading a damaged file."""
    if isinstance(error, UnpicklingError):  # its text is advice about torch.load
        return "a .distcp file is corrupt"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def check(folder: str | Path, spec: ModelSpec) -> None:
    """Raise UserError, naming the file or the tensor, when the checkpoint is not whole or is another model's.

    Reads the index and the sizes of the files, not the weights. No communication.
    """
    folder = Path(folder)
    if not is_megatron_checkpoint(folder):
        raise UserError(f"{folder} is not a Megatron checkpoint: it holds no .distcp files")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{folder / MANIFEST}: format_version={manifest.get('format_version')!r}, not {FORMAT_VERSION}")
    if read_json(folder / "metadata.json").get("sharded_backend") != "torch_dist":
        raise UserError(f"{folder / 'metadata.json'}: sharded_backend is not torch_dist")
    metadata = check_files(folder)
    shapes = {
        name: tuple(stored.size)
        for name, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    _check_shapes(folder, shapes, manifest, spec)


def check_files(folder: Path) -> Metadata:
    """The index of a folder that mcore wrote. Raises UserError, naming the file, for one that is missing or cut."""
    metadata = _read_index(folder)
    sizes: dict[str, int] = {}
    for place in metadata.storage_data.values():
        sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    for file, size in sorted(sizes.items()):
        if not (folder / file).exists():
            raise UserError(f"{folder / file} is missing")
        if (folder / file).stat().st_size < size:
            raise UserError(f"{folder / file} is truncated: {(folder / file).stat().st_size} of {size} bytes")
    # Newer versions of mcore keep the common state among the tensors.
    if not any(name.startswith("common_state") for name in metadata.state_dict_metadata):
        try:
            torch.load(folder / "common.pt", weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{folder / 'common.pt'} is missing") from None
        except Exception:
            raise UserError(f"{folder / 'common.pt'} is truncated or corrupt") from None
    return metadata


def _check_shapes(folder: Path, shapes: dict[str, tuple], manifest: dict[str, Any], spec: ModelSpec) -> None:
    vocabulary = manifest.get("vocabulary")
    if vocabulary != spec.vocab_size:
        raise UserError(f"{folder}: its vocabulary is {vocabulary}, config.json asks for {spec.vocab_size}")
    expected = _stored_shapes(spec, manifest.get("padded_vocabulary"))
    for name, shape in expected.items():
        if name not in shapes:
            raise UserError(f"{folder} misses {name}, which config.json asks for")
        if shapes[name] != shape:
            raise UserError(f"{folder}: {name} has shape {list(shapes[name])}, config.json asks for {list(shape)}")
    unknown = shapes.keys() - expected.keys()
    if unknown:
        raise UserError(f"{folder} holds {len(unknown)} unknown tensors, the first is {min(unknown)}")


def _stored_shapes(spec: ModelSpec, padded_vocabulary: int | None) -> dict[str, tuple[int | None, ...]]:
    """Every tensor of a checkpoint with its shape: a parameter each, the experts of a layer stacked."""
    shapes: dict[str, tuple[int | None, ...]] = {}
    whole = megatron_shapes(spec)
    for entry in entries(spec):
        shape = whole[entry.megatron]
        if entry.layout == "vocabulary":
            shapes[entry.megatron] = (padded_vocabulary, *shape[1:])
        elif entry.expert is not None:
            stacked = entry.megatron.replace(f".local_experts.{entry.expert}.", ".experts.")
            shapes[stacked] = (spec.num_experts, *shape)
        else:
            shapes[entry.megatron] = shape
    return shapes


def _read_index(folder: Path) -> Metadata:
    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError:
        raise UserError(f"{folder / '.metadata'} is missing") from None
    except Exception as error:
        # It is a pickle: a damaged one raises whatever its bytes happen to mean.
        raise UserError(f"{folder / '.metadata'} is truncated or corrupt: {error}") from None
