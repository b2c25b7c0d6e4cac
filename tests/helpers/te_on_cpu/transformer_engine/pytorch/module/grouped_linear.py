from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .base import TransformerEngineBaseModule


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(
        self,
        num_gemms: int,
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
        device: torch.device | str = "cuda",
        *,
        ub_name: str | None = None,
        save_original_input: bool = False,
    ):
        super().__init__()
        self._set_parallel(parallel_mode, tp_group, tp_size, sequence_parallel, fuse_wgrad_accumulation)
        if self.tp_size > 1:
            raise NotImplementedError("Megatron-Core's token dispatcher does the experts' tensor parallelism")
        self.num_gemms, self.in_features, self.out_features = num_gemms, in_features, out_features
        self.save_original_input = save_original_input
        self.use_bias, self.return_bias = bias, return_bias
        for i in range(num_gemms):
            shape = (out_features, in_features)
            self._add_weight(f"weight{i}", shape, params_dtype, init_method, get_rng_state_tracker, rng_tracker_name)
            if bias:
                self._add_bias(f"bias{i}", out_features, params_dtype)

    def forward(self, inp: torch.Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Any:
        """inp [tokens, in] and the tokens of each weight in turn -> [tokens, out]."""
        self.init_fp8_metadata(num_gemms=self.num_gemms)
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)] if self.use_bias else []
        parts = inp.split(m_splits)
        outputs = [self._gemm(part, f"weight{i}", is_first_microbatch) for i, part in enumerate(parts)]
        if self.use_bias and not self.return_bias:
            outputs = [out + bias for out, bias in zip(outputs, biases, strict=True)]
        out = torch.cat(outputs)
        return (out, biases) if self.return_bias else out
