"""Load Hugging Face weights into this rank's part of a Megatron-Core model, one tensor at a time."""

from __future__ import annotations

import re

import torch

from megatron_oprd.hf.convert import shard, to_megatron
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, Entry, entries, own_name
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.runtime import progress
from megatron_oprd.types import ModelSpec

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.local_experts\.)\d+")


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """Return the name of a chunk's parameter in the full model: layers and experts counted from 0 over all ranks."""
    name = _LAYER.sub(lambda number: str(int(number[0]) + first_layer), own_name(name))
    return _EXPERT.sub(lambda number: str(int(number[0]) + first_expert), name)


def parameter_table(spec: ModelSpec) -> dict[str, Entry]:
    """Return the table entry of every parameter by its global name.

    With tied embeddings, the LM head of the last pipeline stage is a copy that is filled from the embedding.
    """
    table: dict[str, Entry] = {entry.megatron: entry for entry in entries(spec)}
    if spec.tied_embeddings:
        table[LM_HEAD.megatron] = EMBEDDING
    return table


def named_parameters(stage: torch.nn.ModuleList) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of all chunks of a stage by their global name."""
    return {
        global_name(name, chunk.first_layer, chunk.first_expert): parameter
        for chunk in stage
        for name, parameter in chunk.named_parameters()
    }


@torch.no_grad()
def load_hf(
    stage: torch.nn.ModuleList,
    reader: HFReader,
    spec: ModelSpec,
    *,
    tensor_rank: int = 0,
    tensor_size: int = 1,
) -> None:
    """Fill every parameter of a stage, cast to the dtype of the parameter. No communication.

    Only the tensors of this rank's layers and experts are read. With tied embeddings, the LM head of the last stage is
    filled from the embedding.

    Raises:
        KeyError: a parameter is not in the table of the model family.
    """
    table = parameter_table(spec)
    for name, parameter in named_parameters(stage).items():
        progress.beat()
        entry = table[name]
        full = to_megatron(entry, [reader.read(hf_name) for hf_name in entry.hf], spec)
        parameter.copy_(shard(entry, full, tensor_rank, tensor_size))
