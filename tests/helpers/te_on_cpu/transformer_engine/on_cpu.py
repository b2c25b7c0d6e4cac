"""Additions of this stand-in to the real package: a record of entered contexts, and FP8 arithmetic by rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch


@dataclass(frozen=True)
class Entered:
    """A context that was entered."""

    kind: Literal["autocast", "model_init"]
    enabled: bool
    recipe: Any
    group: Any  # over which delayed scaling reduces the largest values
    grad_enabled: bool
    preserve_high_precision_init_val: bool = False


entered: list[Entered] = []  # in order; a test clears it


def scale_and_round(tensor: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[torch.Tensor, float]:
    """Return the FP8 values of `tensor` and the factor that restores their scale."""
    largest = tensor.detach().abs().max().float().item() if tensor.numel() else 0.0
    scale = largest / torch.finfo(dtype).max or 1.0
    return (tensor.detach().float() / scale).to(dtype), scale


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    """Return a Float8Tensor with the values of `tensor`."""
    from .pytorch.tensor import Float8Tensor

    return tensor.detach().clone().as_subclass(Float8Tensor).quantize_(tensor)


def fake_quantize(tensor: torch.Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> torch.Tensor:
    """`tensor` rounded to what FP8 can hold, in its own dtype; an FP8 tensor as it is."""
    from .pytorch.tensor import QuantizedTensor

    if isinstance(tensor, QuantizedTensor):
        return tensor.dequantize()
    data, scale = scale_and_round(tensor, dtype)
    return (data.float() * scale).to(tensor.dtype)


def check_fp8_shape(*tensors: torch.Tensor) -> None:
    for tensor in tensors:
        assert math.prod(tensor.shape[:-1]) % 8 == 0 and tensor.shape[-1] % 16 == 0, (
            "FP8 execution requires the product of all dimensions except the last to be divisible by 8 and the last "
            f"dimension to be divisible by 16, but got tensor with dims={list(tensor.shape)}"
        )


class Gemm(torch.autograd.Function):
    """inp [..., in], weight [out, in] -> inp @ weight.T [..., out]; both gradients come from the rounded operands.

    `grad_dtype`, the FP8 type of the incoming gradient, is None outside FP8.
    """

    @staticmethod
    def forward(ctx, inp, weight, rounded_weight, grad_dtype):
        if grad_dtype is not None:
            inp = fake_quantize(inp)
        ctx.save_for_backward(inp, rounded_weight)
        ctx.grad_dtype = grad_dtype
        return torch.nn.functional.linear(inp, rounded_weight)

    @staticmethod
    def backward(ctx, grad):
        inp, rounded_weight = ctx.saved_tensors
        if ctx.grad_dtype is not None:
            grad = fake_quantize(grad, ctx.grad_dtype)
        inp_grad = grad @ rounded_weight if ctx.needs_input_grad[0] else None
        weight_grad = grad.flatten(0, -2).T @ inp.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return inp_grad, weight_grad, None, None


class Exchange(torch.autograd.Function):
    """A collective in forward and its partner in backward, along dimension 0 over `group`.

    The name is "gather", "reduce_scatter", "reduce" or "keep".
    """

    @staticmethod
    def forward(ctx, tensor, group, forward, backward):
        ctx.group, ctx.backward = group, backward
        return _exchange(tensor, group, forward)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.group, ctx.backward), None, None, None


def _exchange(tensor: torch.Tensor, group: Any, kind: str) -> torch.Tensor:
    if kind == "keep":
        return tensor.view_as(tensor)
    size = torch.distributed.get_world_size(group)
    if kind == "gather":
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
        return torch.cat(parts)
    total = tensor.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group)
    return total if kind == "reduce" else total.chunk(size)[torch.distributed.get_rank(group)].contiguous()
