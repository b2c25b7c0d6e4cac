"""The activation of the MLP without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import MegatronModule

from megatron_oprd.runtime.fused import fused


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
        return _activated(gate_and_up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return _gradient(gradients[0], *ctx.saved_tensors)


@fused
def _activated(gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


@fused
def _gradient(gradient: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_and_up.chunk(2, dim=-1)
    for_up = torch.nn.functional.silu(gate).mul_(gradient)
    return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), for_up), dim=-1)
