"""Write a Hugging Face folder without some blocks of the model. No communication."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_oprd.hf.companions import config_with_dtype
from megatron_oprd.hf.experts import fuse_experts
from megatron_oprd.hf.hybrid import LINEAR
from megatron_oprd.hf.kept import kept_tensors
from megatron_oprd.hf.names import hf_shapes
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.hf.weight_files import stored_name
from megatron_oprd.hf.writer import HFWriter
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import write_text

_BLOCK = re.compile(r"(?<=^model\.layers\.)\d+")


def pruned_spec(spec: ModelSpec, kept: Sequence[int]) -> ModelSpec:
    """Return the specification of a model with the blocks `kept` of `spec` only.

    Args:
        kept: blocks, numbered from 1, ascending.
    """
    sparse = tuple(new for new, block in enumerate(kept) if block - 1 in spec.sparse_layers)
    linear = tuple(new for new, block in enumerate(kept) if block - 1 in spec.linear_layers)
    windowed = tuple(new for new, block in enumerate(kept) if block - 1 in spec.windowed_layers)
    config = _pruned_config(spec, kept, sparse)
    if 0 < len(spec.windowed_layers) < spec.num_layers:
        config["layer_types"] = [f"{'sliding' if n in windowed else 'full'}_attention" for n in range(len(kept))]
    layers = {"sparse_layers": sparse, "linear_layers": linear, "windowed_layers": windowed}
    return dataclasses.replace(spec, num_layers=len(kept), hf_config=config, **layers)


def _pruned_config(spec: ModelSpec, kept: Sequence[int], sparse: Sequence[int]) -> dict[str, Any]:
    """Return the content of config.json. The keys that count blocks or have an entry for each block are changed.

    Blocks with Gated DeltaNet are no longer all but every n-th one, so the type of each block is listed.
    """
    if spec.text_tower:
        text = _pruned_config(
            dataclasses.replace(spec, text_tower=False, hf_config=spec.hf_config["text_config"]), kept, sparse
        )
        return {**spec.hf_config, "text_config": text}
    config = {**spec.hf_config, "num_hidden_layers": len(kept)}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = [config["layer_types"][block - 1] for block in kept]
    elif spec.linear_layers:
        linear = {block for block in kept if block - 1 in spec.linear_layers}
        config["layer_types"] = [LINEAR if block in linear else "full_attention" for block in kept]
    if type(config.get("max_window_layers")) is int:
        config["max_window_layers"] = min(config["max_window_layers"], len(kept))
    if spec.sparse_layers:
        # Blocks with experts are no longer every n-th one, so the dense ones are listed.
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [block for block in range(len(kept)) if block not in sparse]
    return config


def write_pruned(
    source: str | Path, target: str | Path, spec: ModelSpec, kept: Sequence[int], texts: Mapping[str, str]
) -> None:
    """Write the model of `source` with the blocks `kept`, with its tokenizer and the other files beside the weights.

    Tensors are copied as they are stored; FP8 weights are dequantised to the dtype of the other weights.

    Args:
        target: the new folder, which appears complete or not at all.
        spec: the model of `source`.
        kept: blocks, numbered from 1, ascending.
        texts: further text files of the folder by name.

    Raises:
        UserError: the folder is not empty, or the disk cannot be written.
    """
    reader, pruned = HFReader(source), pruned_spec(spec, kept)
    dtype = reader.dtype() if reader.quantized else None
    config = pruned.hf_config if dtype is None else config_with_dtype(pruned.hf_config, dtype)
    with HFWriter(target, companions=source, config=config) as writer:
        tensors = _tensors(reader, pruned, kept, dtype)
        for name, tensor in fuse_experts(tensors, pruned) if pruned.fused_experts else tensors:
            writer.write(stored_name(name, text_tower=spec.text_tower), tensor)
        for name, tensor in kept_tensors(source, spec):
            writer.write(name, tensor)
        for name, text in texts.items():
            write_text(writer.partial / name, text)


def _tensors(
    reader: HFReader, pruned: ModelSpec, kept: Sequence[int], dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in hf_shapes(pruned):
        tensor = reader.read(_BLOCK.sub(lambda number: str(kept[int(number[0])] - 1), name))
        yield name, tensor if dtype is None else tensor.to(dtype)
