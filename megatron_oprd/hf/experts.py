"""Convert between the two forms of experts in Hugging Face files.

transformers saves the experts of a layer one by one (`experts.3.gate_proj.weight`), or all of them in two tensors:
`experts.gate_up_proj` [experts, 2 * ffn, hidden] and `experts.down_proj` [experts, hidden, ffn]. Outside of the files,
this package has only the first form.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from megatron_oprd.hf.weight_files import MANIFEST, model_names
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import read_json
from megatron_oprd.types import UserError

_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up_proj|down_proj)$")
_SINGLE = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight$")
_OF_PROJECTION = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


def is_fused(name: str) -> bool:
    """Return True for the name of a tensor with all experts of a layer."""
    return _FUSED.match(name) is not None


def stores_fused_experts(folder: Path) -> bool:
    """Return True if a Hugging Face folder has fused experts, or a Megatron checkpoint was converted from one.

    Folders without readable weights give False.
    """
    if (folder / MANIFEST).exists():
        return read_json(folder / MANIFEST).get("fused_experts") is True
    return any(is_fused(name) for name in model_names(folder))


def check_one_form(names: Collection[str], folder: Path) -> None:
    """Raise UserError if only a part of the experts in a folder is fused."""
    fused = sorted(name for name in names if is_fused(name))
    single = min((name for name in names if _SINGLE.match(name)), default=None)
    if fused and single is not None:
        raise UserError(
            f"{folder} holds experts in two forms, {fused[0]} and {single}; save the model anew in one form"
        )
    for name in fused:
        layer = _FUSED.sub(r"\1", name)
        for other in (layer + part for part in _OF_PROJECTION.values()):
            if other not in names:
                raise UserError(f"{folder} holds {name}, but not {other}; copy the folder again")


def single_experts(name: str, shape: tuple[int, ...], folder: Path) -> Iterator[tuple[str, int, tuple[int, int]]]:
    """Yield the tensors of single experts that a fused tensor contains.

    Args:
        name: name of the fused tensor.
        shape: its shape.
        folder: its folder, for messages.

    Yields: name of an expert's tensor, number of the expert, first and last row (exclusive).

    Raises:
        UserError: no tensor of this shape holds experts.
    """
    match = _FUSED.match(name)
    assert match is not None
    layer, projection = match.groups()
    parts = [part for part, fused in _OF_PROJECTION.items() if fused == projection]
    if len(shape) != 3 or shape[1] % len(parts):
        raise UserError(f"{folder}: {name} has shape {list(shape)}, not [experts, rows, columns]; save the model anew")
    rows = shape[1] // len(parts)
    for expert in range(shape[0]):
        for number, part in enumerate(parts):
            yield f"{layer}{expert}.{part}_proj.weight", expert, (number * rows, (number + 1) * rows)


def fused_name(name: str) -> str:
    """Return the name of the fused tensor that contains an expert's tensor; other names are unchanged."""
    match = _SINGLE.match(name)
    return match[1] + _OF_PROJECTION[match[3]] if match else name


def fused_shapes(spec: ModelSpec) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of all fused tensors of a model by name."""
    experts, ffn, hidden = spec.num_experts, spec.moe_ffn_hidden_size, spec.hidden_size
    return {
        f"model.layers.{layer}.mlp.experts.{name}": shape
        for layer in spec.sparse_layers
        for name, shape in (("gate_up_proj", (experts, 2 * ffn, hidden)), ("down_proj", (experts, hidden, ffn)))
    }


def fuse_experts(tensors: Iterator[tuple[str, torch.Tensor]], spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors by name with the experts of each layer fused; fused tensors are on the CPU.

    Memory: the experts of one layer. `tensors` must contain the experts of a layer in order.
    """
    shapes = fused_shapes(spec)
    layer: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        match = _SINGLE.match(name)
        if match is None:
            yield name, tensor
            continue
        target, expert, part = fused_name(name), int(match[2]), match[3]
        if target not in layer:
            layer[target] = torch.empty(shapes[target], dtype=tensor.dtype)
        start = spec.moe_ffn_hidden_size if part == "up" else 0
        layer[target][expert, start : start + tensor.shape[0]] = tensor.cpu()
        if part == "down" and expert == spec.num_experts - 1:
            yield from layer.items()
            layer = {}
