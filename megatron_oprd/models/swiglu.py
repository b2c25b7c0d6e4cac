"""The activation of the MLP without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import MegatronModule


class SwiGLU(MegatronModule):
    """Computes silu(gate) * up from [..., 2 f], gate first. No communication.

    Backward needs the input alone. Megatron-Core's MLP would store silu(gate) and a copy of `up` too.
    """

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = _SwiGLU.apply(gate_and_up)
        return activated


class _SwiGLU(torch.autograd.Function):
    """SwiGLU with the bits of autograd on `silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        for_gate, for_up = result.chunk(2, dim=-1)
        torch.mul(gradients[0], torch.nn.functional.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=for_gate)
        return result
