from __future__ import annotations

from typing import Any

import torch

from .rmsnorm import _Norm, _normalize


class LayerNorm(_Norm):
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
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        if sequence_parallel is not None:
            self.bias.sequence_parallel = sequence_parallel

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _normalize(input, self._gamma(), self.bias, self.eps, centered=True)
