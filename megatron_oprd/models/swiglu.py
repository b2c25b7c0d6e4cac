"""The activation of the MLP."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import MegatronModule

from megatron_oprd.models.pointwise import kernels_for


class SwiGLU(MegatronModule):
    """Computes silu(gate) * up from [..., 2 f], gate first. No communication.

    Backward needs the input alone. Megatron-Core's MLP would store silu(gate) and a copy of `up` too.
    """

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = _SwiGLU.apply(gate_and_up)
        return activated


class _SwiGLU(torch.autograd.Function):
    """SwiGLU, on a CPU with the bits of autograd on `silu(gate) * up`."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        if (kernels := kernels_for(gate_and_up)) is not None:
            return kernels.swiglu(gate_and_up.contiguous())
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        if (kernels := kernels_for(gate_and_up)) is not None:
            return kernels.swiglu_gradient(gradients[0].contiguous(), gate_and_up.contiguous())
        gate, up = gate_and_up.chunk(2, dim=-1)
        for_up = torch.nn.functional.silu(gate).mul_(gradients[0])
        return torch.cat((torch.ops.aten.silu_backward(gradients[0] * up, gate), for_up), dim=-1)
