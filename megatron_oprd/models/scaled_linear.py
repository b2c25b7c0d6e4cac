"""FP8 weights for a frozen model without Transformer Engine: E4M3 with one scale per tensor, multiplied by torch.

The arithmetic is that of Transformer Engine's current scaling: x and W are divided by scale = max|.| / 448, rounded to
E4M3, multiplied with float32 sums, and scaled back. It needs a CPU or a GPU of compute capability 8.9 or later.
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
    """Convert the weights of the linear layers of a loaded, frozen stage to FP8.

    Embedding, norms, routers and biases are not converted. A tensor-parallel weight has one scale for all ranks.

    Args:
        keep_bf16: number of first and of last layers of the model that are not converted.

    Returns:
        The number of converted layers of this stage.

    Communicates over: the tensor-parallel group.
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
    """Replaces `_forward_impl` of a Megatron-Core linear layer: the product with an FP8 weight."""

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
        """Return the product [..., out] in the dtype of the input. Computes no gradient.

        Args:
            input: [..., in], bf16 or float32.
            weight: [out, in], E4M3.
            sequence_parallel: gather the input over `tp_group` first.
        """
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, group=tp_group)
        output = scaled_product(input.flatten(0, -2), weight, self.weight_scale).unflatten(0, input.shape[:-1])
        return output if bias is None else output + bias


def scaled_product(x: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    """Return x W^T [rows, out] in the dtype of x, from x [rows, in], an E4M3 weight [out, in] and its scale []."""
    if not len(x):  # an expert without tokens
        return x.new_empty(0, len(weight))
    scale = _scale(x.abs().amax().float())
    return torch._scaled_mm(_rounded(x, scale), weight.t(), scale, weight_scale, out_dtype=x.dtype)


def _scale(largest: torch.Tensor) -> torch.Tensor:
    return largest.clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8)
