"""Dequantise FP8 weights that are stored with one scale for each block, as Qwen publishes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_oprd.types import UserError

SCALE = "_scale_inv"  # ends the name of a weight's scales
STORED_AS = "F8_E4M3"
_USE = "use the model without quantisation, or in FP8 with weight_block_size"


def weight_block_size(config: dict[str, Any], where: str | Path) -> tuple[int, int] | None:
    """Return the rows and columns of a block that shares one scale, or None for a model without quantisation.

    Args:
        config: content of config.json.
        where: its path, for messages.

    Raises:
        UserError: another quantisation. Names it.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        quantization = config.get("compression_config")
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise UserError(f"{where}: quantization_config={quantization!r} must be a dict")
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method != "fp8":
        raise UserError(f"{where}: quantization_config with quant_method {method!r} is not supported; {_USE}")
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise UserError(f"{where}: quantization_config has weight_block_size={block!r}, not two sizes; {_USE}")
    for key, supported in (
        ("fmt", "e4m3"),
        ("activation_scheme", "dynamic"),
        ("scale_fmt", "float"),
        ("expert_dtype", "fp8"),
    ):
        if quantization.get(key, supported) != supported:
            raise UserError(
                f"{where}: quantization_config has {key}={quantization[key]!r}, only {supported!r} is supported; {_USE}"
            )
    return block[0], block[1]


def scale_shape(weight: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight [..., rows, columns]; the last blocks may be smaller."""
    return (*weight[:-2], -(-weight[-2] // block[0]), -(-weight[-1] // block[1]))


def dequantize(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], first_row: int = 0) -> torch.Tensor:
    """Return weight times the scale of each block.

    Args:
        weight: [rows, columns] float8_e4m3fn: all rows of the stored weight, or some.
        scales: [blocks of rows, blocks of columns] of the stored weight.
        block: rows and columns of a block.
        first_row: number of the first row in the stored weight.

    Returns: [rows, columns] float32.
    """
    rows = (first_row + torch.arange(weight.shape[0])) // block[0]
    columns = torch.arange(weight.shape[1]) // block[1]
    return weight.float() * scales.float()[rows[:, None], columns]
