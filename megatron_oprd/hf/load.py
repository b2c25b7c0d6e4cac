"""Hugging Face weights straight into the chunks that a rank holds of a Megatron-Core model, one tensor at a time."""

from __future__ import annotations

import re

import torch

from megatron_oprd.hf.convert import shard, to_megatron
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, Entry, entries, own_name
from megatron_oprd.hf.stream import HFReader
from megatron_oprd.runtime import progress
from megatron_oprd.types import ModelSpec

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_EXPERT = re.compile(r"(?<=\.mlp\.experts\.local_experts\.)\d+")


def global_name(name: str, first_layer: int, first_expert: int) -> str:
    """A chunk's parameter name as the tables have it, its layer and its expert numbered from 0 over the whole model."""
    name = _LAYER.sub(lambda number: str(int(number[0]) + first_layer), own_name(name))
    return _EXPERT.sub(lambda number: str(int(number[0]) + first_expert), name)


def parameter_table(spec: ModelSpec) -> dict[str, Entry]:
    """The entry of every parameter by its global name. A tied last pipeline stage has a head of its own, which is made
    from the embedding."""
    table: dict[str, Entry] = {entry.megatron: entry for entry in entries(spec)}
    if spec.tied_embeddings:
        table[LM_HEAD.megatron] = EMBEDDING
    return table


def named_parameters(stage: torch.nn.ModuleList) -> dict[str, torch.nn.Parameter]:
    """The parameters of all chunks of a stage by their name in the whole model."""
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
    """Fill every parameter of a stage, cast to the parameter's dtype. Reads the tensors of its own layers and experts
    only.

    A tied last stage has a head of its own, filled from the embedding. Raises KeyError for a parameter that the
    family's table does not know. No communication.
    """
    table = parameter_table(spec)
    for name, parameter in named_parameters(stage).items():
        progress.beat()
        entry = table[name]
        whole = to_megatron(entry, [reader.read(hf_name) for hf_name in entry.hf], spec)
        parameter.copy_(shard(entry, whole, tensor_rank, tensor_size))
