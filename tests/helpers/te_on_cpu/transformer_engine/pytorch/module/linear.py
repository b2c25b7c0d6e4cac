from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import TransformerEngineBaseModule


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        *,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_name: str | None = None,
        save_original_input: bool = False,
    ):
        super().__init__()
        self._set_parallel(parallel_mode, tp_group, tp_size, sequence_parallel, fuse_wgrad_accumulation)
        self.in_features, self.out_features = in_features, out_features
        if parallel_mode == "column":
            self.out_features //= self.tp_size
        elif parallel_mode == "row":
            self.in_features //= self.tp_size
        self.save_original_input = save_original_input
        self.use_bias, self.return_bias, self.ub_name = bias, return_bias, ub_name
        shape = (self.out_features, self.in_features)
        self._add_weight("weight", shape, params_dtype, init_method, get_rng_state_tracker, rng_tracker_name)
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
        out = self._leave(self._gemm(self._enter(inp), "weight", is_first_microbatch))
        if self.use_bias and not self.return_bias:
            out = out + self.bias
        return (out, self.bias) if self.return_bias else out
