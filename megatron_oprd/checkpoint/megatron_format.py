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
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.fp8_utils import is_float8tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_oprd.checkpoint.format_checks import FORMAT_VERSION, check_files, check_model, describe_damage
from megatron_oprd.checkpoint.sharded_write import PlannedWrite, plan_write, write_new_folder
from megatron_oprd.checkpoint.stock_names import extra_states, fused_norms
from megatron_oprd.checkpoint.stored_index import COPY_AGAIN
from megatron_oprd.hf.companions import config_with_dtype, copy_companions
from megatron_oprd.hf.kept import copy_kept
from megatron_oprd.hf.load import global_name, named_parameters
from megatron_oprd.hf.names import padded_vocab_size
from megatron_oprd.hf.weight_files import MANIFEST
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.rank_zero import on_every_rank
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import explain_os_errors, write_json
from megatron_oprd.types import UserError


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
