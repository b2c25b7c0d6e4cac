"""A model's weights as a Megatron-Core distributed checkpoint, which any parallel layout can load.

`saver.py` plans writes of the student, `weights.py` and `training_state.py` load, `tools/checkpoint_convert` saves and
loads. The folder contains:

- mcore's files: `*.distcp`, `.metadata`, `metadata.json`, `common.pt`;
- the Hugging Face files besides the weights: config.json, tokenizer, chat template. Code that needs these files accepts
  the folder in place of a Hugging Face folder;
- the manifest `megatron_oprd.json`.

Every layer is a separate tensor (`decoder.layers.3.mlp.linear_fc1.weight`). A model that ends below the last layer, or
that has no LM head, loads only its own tensors. The experts of a layer are one tensor with the experts in dimension 0
(`decoder.layers.3.mlp.experts.experts.linear_fc1.weight`); each rank writes and loads its own experts. Norms are stored
a second time under the names of a stock GPTModel, with empty extra states, so that mcore loads the folder into such a
model. Nothing here loads them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_oprd.checkpoint.sharded_write import PlannedWrite, plan_write, write_new_folder
from megatron_oprd.checkpoint.stock_names import extra_states, fused_name, fused_norms
from megatron_oprd.checkpoint.stored_index import COPY_AGAIN, read_index
from megatron_oprd.hf.companions import config_with_dtype, copy_companions
from megatron_oprd.hf.kept import copy_kept
from megatron_oprd.hf.load import global_name, named_parameters
from megatron_oprd.hf.names import entries, megatron_shapes, padded_vocab_size
from megatron_oprd.hf.weight_files import MANIFEST
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import (
    explain_os_errors,
    read_json,
    write_json,
)
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import ModelSpec, UserError

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


def sharded_weights(stage: torch.nn.ModuleList, topology: Topology) -> dict[str, Any]:
    """Return mcore's sharded state dict of all chunks of a stage, with one tensor a layer.

    Keys are the parameters' names in the complete model. The modules' extra states are left out: they are empty without
    Transformer Engine, and the files then do not depend on the layer spec.
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
    """Write the weights of all ranks to a new folder, in the model's dtype, with the Hugging Face files of `source`.

    Collective over the world, on a file system that all ranks share. The folder appears when it is complete. Raises
    UserError on every rank for a folder that is not empty and for a disk error.
    """
    write_new_folder(
        folder,
        topology,
        lambda partial: plan_model(stage, partial, topology),
        lambda partial: describe_model(stage, partial, spec, topology, source),
    )


def plan_model(stage: torch.nn.ModuleList, folder: str | Path, topology: Topology) -> PlannedWrite:
    """Plan to write the weights of all ranks into the empty `folder`, also under the names of stock models.

    Collective over the world. Raises what mcore, torch and the disk raise.
    """
    state = sharded_weights(stage, topology)
    apply_factories(state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    stock: dict[str, Any] = {norm.key: norm for norm in fused_norms(tensors)}
    stock |= {extra.unique_key: extra for extra in extra_states(tensors, topology)}
    return plan_write({**state, **stock}, folder, content_metadata={"non_homogeneous_layers": True})


def describe_model(
    stage: torch.nn.ModuleList, folder: Path, spec: ModelSpec, topology: Topology, source: str | Path
) -> None:
    """Write the files besides the weights: the Hugging Face files of `source`, config.json and the manifest.

    One rank calls this. Raises UserError for a disk error.
    """
    dtype = next(stage.parameters()).dtype
    manifest = {
        "format_version": FORMAT_VERSION,
        "dtype": str(dtype).removeprefix("torch."),
        "architecture": spec.architecture,
        "num_layers": spec.num_layers,
        "vocabulary": spec.vocab_size,
        "padded_vocabulary": padded_vocab_size(spec, topology.tensor_size),
        **({"fused_experts": True} if spec.fused_experts else {}),
    }
    with explain_os_errors(folder):
        copy_companions(Path(source), folder)
        copy_kept(source, folder, spec)
    write_json(folder / "config.json", config_with_dtype(spec.hf_config, dtype))
    write_json(folder / MANIFEST, manifest)


def is_megatron_checkpoint(folder: str | Path) -> bool:
    """Return True if a folder contains files of a distributed checkpoint, complete or damaged."""
    folder = Path(folder)
    return any((folder / name).exists() for name in (".metadata", MANIFEST)) or any(folder.glob("*.distcp"))


def checkpoint_dtype(folder: str | Path) -> torch.dtype:
    """Return the dtype of the weights in a Megatron checkpoint. Raises UserError for a manifest without a dtype."""
    path = Path(folder) / MANIFEST
    name = read_json(path).get("dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise UserError(f"{path}: dtype={name!r} must be {', '.join(_DTYPES)}; set it to the dtype of the weights")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_model(stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology) -> None:
    """Load every parameter of a stage, cast to the parameter's dtype.

    Args:
        spec: the complete model; `stage` may end below its last layer or lack the LM head.

    Collective over the world; every rank reads its own part. Raises UserError on every rank, with the file or the
    tensor, for an incomplete folder and for another model's weights.
    """
    check_model(folder, spec)
    fill_stage(stage, topology, folder, lambda state: dist_checkpointing.load(state, str(folder)))


def fill_stage(
    stage: torch.nn.ModuleList,
    topology: Topology,
    folder: str | Path,
    load: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Fill every parameter of a stage with what `load` returns for mcore's sharded state dict of the stage.

    Collective over the world. Raises UserError on every rank, with `folder`, for an error of mcore or torch.
    """

    def read() -> dict[str, Any]:
        try:
            return load(sharded_weights(stage, topology))
        except checkpoint.api.CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            raise UserError(f"{folder} cannot be read (rank {rank}): {describe_damage(cause)}", COPY_AGAIN) from None
        except dist_checkpointing.core.CheckpointingException as error:
            raise UserError(f"{folder} cannot be read: {error}", COPY_AGAIN) from None

    loaded = on_every_rank(read)  # some versions of mcore raise an error only on the rank that found it
    with torch.no_grad():
        for name, parameter in named_parameters(stage).items():
            # mcore loads into the parameter's own storage, with two exceptions: parameters that it joins from pieces,
            # and FP8 parameters, which are quantized from the loaded values.
            if is_float8tensor(parameter) or loaded[name].data_ptr() != parameter.data_ptr():
                parameter.copy_(loaded[name])


def load_parameter(folder: str | Path, name: str) -> torch.Tensor:
    """Return one unsharded parameter of a Megatron checkpoint, on the CPU, in the dtype of the file.

    No communication. Raises UserError, with the folder, for damaged files.
    """
    stored = check_files(Path(folder)).state_dict_metadata[name]
    assert isinstance(stored, TensorStorageMetadata)
    return read_tensor(Path(folder), name, stored)


def read_tensor(folder: Path, name: str, stored: TensorStorageMetadata) -> torch.Tensor:
    """Return one unsharded tensor of a folder whose index has been checked, on the CPU, in the dtype of the file.

    No communication. Raises UserError, with the folder, for damaged files.
    """
    parameter = torch.empty(stored.size, dtype=stored.properties.dtype)
    try:
        checkpoint.load({name: parameter}, storage_reader=FileSystemReader(folder), no_dist=True)
    except checkpoint.api.CheckpointException as error:
        damage = describe_damage(next(iter(error.failures.values()))[0])
        raise UserError(f"{folder} cannot be read: {damage}", COPY_AGAIN) from None
    return parameter


def describe_damage(error: BaseException) -> str:
    """Describe an exception that torch or mcore raised for a damaged file, in one short line."""
    if isinstance(error, UnpicklingError):  # its text gives advice about torch.load
        return "a .distcp file is corrupt"
    return f"{type(error).__name__}: {error_line(error)}"


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
