"""Hugging Face weights straight into a pipeline stage of a Megatron-Core model, one tensor at a time."""

from __future__ import annotations

import torch

from megatron_oprd.hf.convert import shard, to_megatron
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, Entry, entries
from megatron_oprd.hf.stream import HFReader
from megatron_oprd.types import ModelSpec

_LAYERS = "decoder.layers."


def global_name(name: str, first_layer: int) -> str:
    """A stage's parameter name with its layer numbered from 0 over the whole model."""
    if not name.startswith(_LAYERS):
        return name
    local, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{int(local) + first_layer}.{rest}"


def parameter_table(spec: ModelSpec) -> dict[str, Entry]:
    """The entry of every parameter by its global name. A tied last pipeline stage has a head of its own, which is made
    from the embedding."""
    table: dict[str, Entry] = {entry.megatron: entry for entry in entries(spec)}
    if spec.tied_embeddings:
        table[LM_HEAD.megatron] = EMBEDDING
    return table


def named_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A stage's parameters by their name in the whole model."""
    return {global_name(name, model.first_layer): parameter for name, parameter in model.named_parameters()}


@torch.no_grad()
def load_hf(
    model: torch.nn.Module,
    reader: HFReader,
    spec: ModelSpec,
    *,
    tensor_rank: int = 0,
    tensor_size: int = 1,
) -> None:
    """Fill every parameter of a stage, cast to the parameter's dtype.

    A tied last stage has a head of its own, filled from the embedding. Raises KeyError for a parameter that the
    family's table does not know. No communication.
    """
    table = parameter_table(spec)
    for name, parameter in named_parameters(model).items():
        entry = table[name]
        whole = to_megatron(entry, [reader.read(hf_name) for hf_name in entry.hf], spec)
        parameter.copy_(shard(entry, whole, tensor_rank, tensor_size))
