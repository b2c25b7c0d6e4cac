"""Stand-ins that have the memory of Transformer Engine's modules while an update is traced on a CPU.

For each token and block, Transformer Engine stores less than the modules of this package:

- A fused norm and linear layer stores the norm's input and output, not the normalized values between them.
- Fused attention stores the rotated queries and keys, the values and its output, and not the output of the QKV layer.
- The fused activation of the MLP has no temporary tensors in backward, and fused AdamW has none at all.

All else is the same. docs/results/plans.md compares the sum with measurements.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_oprd.models import micro_batch
from megatron_oprd.models.attention import PackedAttention
from megatron_oprd.models.norm import RMSNorm
from megatron_oprd.models.rotary import rotate
from megatron_oprd.models.swiglu import SwiGLU
from megatron_oprd.planning.megatron_patches import Patch


def fused_patches() -> list[Patch]:
    """Return the patches that give the modules of this package the memory of Transformer Engine's."""
    return [
        Patch(RMSNorm, "forward", _run_norm, "a fused kernel stores no normalized values"),
        Patch(PackedAttention, "forward", _run_attention, "a fused kernel stores its inputs and its output"),
        Patch(SwiGLU, "forward", _run_activation, "a fused kernel has no temporary tensors in backward"),
    ]


def _run_norm(norm: RMSNorm, hidden_states: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = _Norm.apply(hidden_states, norm.weight)
    return output


def _run_attention(
    attention: PackedAttention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    batch = micro_batch.of(kwargs)
    assert batch.rotary is not None  # the model computes it before its first layer
    query, key = (rotate(x.squeeze(1), *batch.rotary) for x in (query, key))
    output: torch.Tensor = _Attention.apply(query, key, value.squeeze(1).contiguous())
    return output.reshape(len(query), 1, -1)


def _run_activation(_: SwiGLU, gate_and_up: torch.Tensor) -> torch.Tensor:
    activated: torch.Tensor = _Activation.apply(gate_and_up)
    return activated


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.scale = hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(hidden_states, weight)
        return torch.empty_like(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors))


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        return torch.empty_like(gate_and_up[..., ::2], memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = torch.empty_like(query)
        ctx.sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))
