"""RMSNorm without Transformer Engine, aware of sequence parallelism (mcore's WrappedTorchNorm refuses it)."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from megatron_oprd.runtime.fused import fused


class RMSNorm(torch.nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps), the statistics in float32. No communication.

    The cast back to the input's dtype comes before the multiplication by the weight, as in Hugging Face's Qwen, so
    that bf16 results agree. With `layernorm_zero_centered_gamma` the factor is 1 + weight, and the cast comes last, as
    in Qwen3-Next. With sequence parallelism the weight's gradient is all-reduced by Megatron, which looks for
    `weight.sequence_parallel`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.is_cuda and not self.zero_centered:
            normed: torch.Tensor = FusedRMSNorm.apply(hidden_states, self.weight, self.eps)
            return normed
        return self.scale(self.normalize(hidden_states))

    def normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the norm's output before its multiplication by the weight."""
        if self.zero_centered:
            hidden_states = hidden_states.float()
        # With the weight inside of rms_norm, bf16 results would be rounded once instead of twice.
        return torch.nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], None, self.eps)

    def scale(self, normalized: torch.Tensor) -> torch.Tensor:
        """Return the norm's output from that of `normalize`."""
        if self.zero_centered:
            return (normalized * (self.weight.float() + 1)).to(self.weight.dtype)
        return self.weight * normalized


class FusedRMSNorm(torch.autograd.Function):
    """The same values, with a backward of its own: one kernel forward, and on a GPU two for both gradients."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        normed, scale = _normed(states, weight, eps)
        ctx.save_for_backward(states, scale, weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return *_gradients(gradients[0], *ctx.saved_tensors), None


@fused
def _normed(states: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight * x * scale, and scale = 1 / sqrt(mean(x^2) + eps) [..., 1] in float32 at least."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * scale).to(states.dtype), scale


@fused
def _gradients(
    gradient: torch.Tensor, states: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients for the states and for the weight."""
    normed, wide = states.to(scale.dtype) * scale, gradient.to(scale.dtype)
    for_normed = wide * weight.to(scale.dtype)
    for_states = scale * (for_normed - normed * (for_normed * normed).mean(-1, keepdim=True))
    for_weight = (wide * normed).flatten(0, -2).sum(0)
    return for_states.to(states.dtype), for_weight.to(weight.dtype)
