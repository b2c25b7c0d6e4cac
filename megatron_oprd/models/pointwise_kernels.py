"""Rotary embedding and SwiGLU as Triton kernels for CUDA devices. Importing this file needs Triton. No communication.

Each output is computed in float32 and rounded once. `models/pointwise.py` chooses between these kernels and torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SWIGLU_COLUMNS = 1024  # columns of a program


def rotate(states: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor, *, backward: bool) -> torch.Tensor:
    """Return what `rotary.rotate` returns, or its gradient, [tokens, heads, d].

    Args:
        states: [tokens, heads, d]; in backward the gradient of the result.
        cos, signed_sin: [tokens, 1, rotary_dim], contiguous.
        backward: True returns the gradient of the states.
    """
    if states.stride(-1) != 1:
        states = states.contiguous()
    tokens, heads, width = states.shape
    half = cos.shape[-1] // 2
    rest = width - 2 * half
    rotated = torch.empty(states.shape, dtype=states.dtype, device=states.device)
    if tokens:
        _rotate_token[(tokens,)](
            states,
            cos,
            signed_sin,
            rotated,
            states.stride(0),
            states.stride(1),
            heads,
            width,
            HALF=half,
            REST=rest,
            HEADS=triton.next_power_of_2(heads),
            COLUMNS=triton.next_power_of_2(max(half, rest)),
            BACKWARD=backward,
        )
    return rotated


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up [..., f] from a contiguous [..., 2 f], gate first."""
    width = gate_and_up.shape[-1] // 2
    activated = gate_and_up.new_empty(*gate_and_up.shape[:-1], width)
    if activated.numel():
        _swiglu[_grid(activated)](gate_and_up, activated, width, COLUMNS=SWIGLU_COLUMNS)
    return activated


def swiglu_gradient(gradient: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `gate_and_up` [..., 2 f] from the gradient [..., f] of `swiglu`; both contiguous."""
    result = torch.empty_like(gate_and_up)
    if gradient.numel():
        _swiglu_gradient[_grid(gradient)](gradient, gate_and_up, result, gradient.shape[-1], COLUMNS=SWIGLU_COLUMNS)
    return result


def _grid(activated: torch.Tensor) -> tuple[int, int]:
    width = activated.shape[-1]
    return activated.numel() // width, triton.cdiv(width, SWIGLU_COLUMNS)


@triton.jit
def _rotate_token(
    states,
    cos,
    signed_sin,
    rotated,
    token_stride,
    head_stride,
    heads,
    width,
    HALF: tl.constexpr,  # half of rotary_dim
    REST: tl.constexpr,  # dimensions without rotation
    HEADS: tl.constexpr,  # at least the heads, a power of 2
    COLUMNS: tl.constexpr,  # at least HALF and REST, a power of 2
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    source = states + token * token_stride + head * head_stride + column
    target = rotated + token * heads * width + head * width + column
    used = (head < heads) & (column < HALF)
    row = token * 2 * HALF + column
    first = tl.load(source, mask=used).to(tl.float32)
    second = tl.load(source + HALF, mask=used).to(tl.float32)
    first_cos = tl.load(cos + row, mask=column < HALF).to(tl.float32)
    second_cos = tl.load(cos + row + HALF, mask=column < HALF).to(tl.float32)
    first_sin = tl.load(signed_sin + row, mask=column < HALF).to(tl.float32)
    second_sin = tl.load(signed_sin + row + HALF, mask=column < HALF).to(tl.float32)
    if BACKWARD:
        first_sin, second_sin = second_sin, first_sin
    tl.store(target, (first * first_cos + second * first_sin).to(rotated.dtype.element_ty), mask=used)
    tl.store(target + HALF, (second * second_cos + first * second_sin).to(rotated.dtype.element_ty), mask=used)
    if REST > 0:
        kept = (head < heads) & (column < REST)
        tl.store(target + 2 * HALF, tl.load(source + 2 * HALF, mask=kept), mask=kept)


@triton.jit
def _swiglu(gate_and_up, activated, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < width
    source = gate_and_up + row * 2 * width + column
    gate = tl.load(source, mask=used).to(tl.float32)
    up = tl.load(source + width, mask=used).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(activated + row * width + column, result.to(activated.dtype.element_ty), mask=used)


@triton.jit
def _swiglu_gradient(gradient, gate_and_up, result, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    used = column < width
    source = gate_and_up + row * 2 * width + column
    target = result + row * 2 * width + column
    gate = tl.load(source, mask=used).to(tl.float32)
    up = tl.load(source + width, mask=used).to(tl.float32)
    upstream = tl.load(gradient + row * width + column, mask=used).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    for_gate = upstream * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(target, for_gate.to(result.dtype.element_ty), mask=used)
    tl.store(target + width, (upstream * gate * sigmoid).to(result.dtype.element_ty), mask=used)
