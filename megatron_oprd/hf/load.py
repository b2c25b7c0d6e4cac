"""Load Hugging Face weights into this rank's part of a Megatron-Core model, one tensor at a time."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor

import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_oprd.hf.convert import fill_shard
from megatron_oprd.hf.names import EMBEDDING, LM_HEAD, Entry, entries, own_name
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime import progress

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


def load_hf(
    stage: torch.nn.ModuleList,
    reader: HFReader,
    spec: ModelSpec,
    *,
    tensor_rank: int = 0,
    tensor_size: int = 1,
) -> None:
    """Fill every parameter of a stage, cast to the dtype of the parameter. No communication.

    Only the rows of this rank, and of its layers and experts, are read; a few threads copy them from the mapped files
    to the device. With tied embeddings, the LM head of the last stage is filled from the embedding.

    Raises:
        KeyError: a parameter is not in the table of the model family.
    """
    table, named = parameter_table(spec), named_parameters(stage)
    entry_of = {name: table[name] for name in named}
    stored = torch.float32 if reader.quantized else reader.dtype()

    @torch.no_grad()  # holds for one thread alone
    def fill(name: str) -> None:
        parameter = named[name]
        if not is_float8tensor(parameter):
            fill_shard(parameter.data, entry_of[name], reader, spec, tensor_rank, tensor_size)
            return
        values = torch.empty(parameter.shape, dtype=stored)
        fill_shard(values, entry_of[name], reader, spec, tensor_rank, tensor_size)
        parameter.copy_(values)  # quantizes the complete shard

    device = next((parameter.device for parameter in named.values()), torch.device("cpu"))
    with ThreadPoolExecutor(reading_threads(), initializer=_use_device, initargs=(device,)) as pool:
        for _ in pool.map(fill, named):
            progress.beat()


def _use_device(device: torch.device) -> None:
    """Make a CUDA device the current one of a new thread. Transformer Engine quantizes on it; the default is cuda:0."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def reading_threads() -> int:
    """Return the number of threads that read weights in this process: its share of the processors, at most 4."""
    return max(min(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 4), 1)
