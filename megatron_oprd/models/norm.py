"""RMSNorm without Transformer Engine, aware of sequence parallelism (mcore's WrappedTorchNorm refuses it)."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig


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
