"""FP8 weights of a frozen model without Transformer Engine: one byte a weight, tensorwise scales, torch's own product.

The same arithmetic as Transformer Engine's current scaling with E4M3: x and W are divided by their greatest magnitude
over 448, rounded to E4M3, multiplied with sums in float32, and scaled back. It runs on a CPU as on a GPU of compute
capability 8.9.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_oprd.models.model import Stage

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max  # 448


@torch.no_grad()
def quantize_weights(stage: Stage, keep_bf16: tuple[int, int]) -> int:
    """Turn the weights of every linear layer of a loaded, frozen stage to FP8, but for the lowest and the highest of
    the model's blocks; embedding, norms, routers and biases stay. Returns how many blocks of the stage were turned.

    A tensor-parallel weight has one scale over all ranks: communicates over the tensor-parallel group.
    """
    first, last = keep_bf16
    most = stage.config.num_layers - last
    layers = [layer for chunk in stage for layer in chunk.decoder.layers if first < layer.layer_number <= most]
    for layer in layers:
        for module in layer.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                _quantize(module)
    return len(layers)


def _quantize(linear: ColumnParallelLinear | RowParallelLinear) -> None:
    weight = linear.weight.detach()
    largest = weight.abs().amax().float()
    if dist.get_world_size(linear.tp_group) > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, linear.tp_group)
    scale = _scale(largest)
    linear.weight = torch.nn.Parameter(_rounded(weight, scale), requires_grad=False)
    linear._forward_impl = ScaledProduct(scale)


class ScaledProduct:
    """Stands in a linear layer of mcore's for its product with the weight."""

    def __init__(self, weight_scale: torch.Tensor) -> None:
        self.weight_scale = weight_scale  # [] float32

    def __call__(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None,
        **ignored: Any,
    ) -> torch.Tensor:
        """input [..., in] in bf16 or float32, weight [out, in] in E4M3 -> [..., out] in the input's dtype. With
        sequence parallelism the input is gathered over `tp_group` first. No gradient."""
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        output = scaled_product(input.flatten(0, -2), weight, self.weight_scale).unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


def scaled_product(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """x [rows, in] times the transpose of an E4M3 weight [out, in] with its scale [] -> [rows, out] in x's dtype."""
    if not len(x):  # an expert that nobody chose
        return x.new_empty(0, len(weight))
    scale = _scale(x.abs().amax().float())
    return torch._scaled_mm(_rounded(x, scale), weight.t(), scale, weight_scale, out_dtype=x.dtype)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    return largest.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)
