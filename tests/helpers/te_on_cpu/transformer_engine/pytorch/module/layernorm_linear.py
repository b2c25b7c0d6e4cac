from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import TransformerEngineBaseModule
from .rmsnorm import _normalize


class LayerNormLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-05,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        *,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
    ):
        super().__init__()
        if return_layernorm_output or parallel_mode not in (None, "column"):
            raise NotImplementedError(f"{return_layernorm_output=}, {parallel_mode=}")
        self._set_parallel(parallel_mode, tp_group, tp_size, sequence_parallel, fuse_wgrad_accumulation)
        self.in_features = in_features
        self.out_features = out_features // (self.tp_size if parallel_mode == "column" else 1)
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.use_bias, self.return_bias, self.ub_name = bias, return_bias, ub_name
        start = torch.zeros if zero_centered_gamma else torch.ones
        self.layer_norm_weight = torch.nn.Parameter(start(in_features, dtype=params_dtype))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=params_dtype))
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel
        shape = (self.out_features, in_features)
        self._add_weight("weight", shape, params_dtype, init_method, get_rng_state_tracker, None)
        if bias:
            self._add_bias("bias", self.out_features, params_dtype)
        else:
            self.bias = torch.empty(0, dtype=params_dtype)

    def forward(
        self,
        inp: torch.Tensor,
        is_first_microbatch: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        self.init_fp8_metadata()
        gamma = self.layer_norm_weight + 1 if self.zero_centered_gamma else self.layer_norm_weight
        normed = _normalize(inp, gamma, self.layer_norm_bias, self.eps, centered=self.normalization == "LayerNorm")
        out = self._gemm(self._enter(normed), "weight", is_first_microbatch)
        if self.use_bias and not self.return_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out
