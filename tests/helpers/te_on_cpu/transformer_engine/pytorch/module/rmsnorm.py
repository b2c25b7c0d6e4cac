from __future__ import annotations

from typing import Any

import torch


def _normalize(inp: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None, eps: float, centered: bool):
    """Normalize in float32 and round once, to the dtype of `inp`."""
    values = inp.float()
    if centered:
        values = values - values.mean(-1, keepdim=True)
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * gamma.float()
    return (values if beta is None else values + beta.float()).to(inp.dtype)


class _Norm(torch.nn.Module):
    def __init__(self, size: Any, eps: float, sequence_parallel: bool | None, dtype: Any, zero_centered: bool):
        super().__init__()
        self.eps, self.zero_centered_gamma = eps, zero_centered
        self.weight = torch.nn.Parameter((torch.zeros if zero_centered else torch.ones)(size, dtype=dtype))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None: ...

    def _gamma(self) -> torch.Tensor:
        return self.weight + 1 if self.zero_centered_gamma else self.weight


class RMSNorm(_Norm):
    def __init__(
        self,
        normalized_shape: Any = None,
        eps: float = 1e-05,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = None,
    ):
        super().__init__(hidden_size or normalized_shape, eps, sequence_parallel, params_dtype, zero_centered_gamma)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _normalize(input, self._gamma(), None, self.eps, centered=False)
