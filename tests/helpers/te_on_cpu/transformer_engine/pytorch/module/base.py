"""Shared parts of the modules: parameters, tensor parallelism, cached FP8 weights and their extra state."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any

import torch

from ...common.recipe import Format
from ...on_cpu import Exchange, Gemm, check_fp8_shape, fake_quantize, quantized
from ..quantization import FP8GlobalStateManager


def initialize_ub(shape: list, tp_size: int, use_fp8: bool = False) -> None:
    raise NotImplementedError("user buffers are CUDA memory")


def get_dummy_wgrad(shape: list, dtype: torch.dtype, zero=False) -> torch.Tensor:
    """Return the placeholder for `weight.grad` when the gradient went to `weight.main_grad`."""
    return torch.zeros(shape, dtype=dtype)


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8 = self.fp8_calibration = False
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": FP8GlobalStateManager.get_fp8_recipe()}
        self._fp8_workspaces: dict[str, torch.Tensor] = {}
        self.tp_group, self.tp_size = None, 1

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        self.fp8_meta["fp8_checkpoint"] = self.fp8
        if self.fp8:
            self.fp8_meta.update(recipe=FP8GlobalStateManager.get_fp8_recipe(), num_gemms=num_gemms)

    def get_extra_state(self) -> torch.Tensor:
        if not self.fp8:
            return torch.empty(0, dtype=torch.uint8)
        variables = {"num_gemms": self.fp8_meta["num_gemms"], "fp8_checkpoint": True}
        state = {"recipe": self.fp8_meta["recipe"], "extra_fp8_variables": variables}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor | None) -> None:
        if state is not None and state.numel():
            state = pickle.loads(state.detach().numpy().tobytes())
            self.fp8_meta.update(state["extra_fp8_variables"], recipe=state["recipe"])

    def backward_dw(self) -> None:
        raise NotImplementedError("delay_wgrad_compute")

    def _set_parallel(self, mode: Any, group: Any, size: int, sequence_parallel: bool, fuse_wgrad_accumulation: bool):
        self.parallel_mode, self.tp_group = mode, group
        self.tp_size = size if group is None else torch.distributed.get_world_size(group)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        if fuse_wgrad_accumulation:
            raise NotImplementedError("fuse_wgrad_accumulation: Megatron-Core's own layers need apex for it")

    def _add_weight(self, name: str, shape: tuple[int, int], dtype: Any, init_method: Any, tracker: Any, rng: Any):
        """Add a weight made by `init_method` under the tracker's random state; in FP8 inside `quantized_model_init`."""
        data = torch.empty(shape, dtype=dtype)
        fork = tracker().fork(*([rng] if rng else [])) if tracker else contextlib.nullcontext()
        with fork, torch.no_grad():
            (init_method or (lambda weight: torch.nn.init.normal_(weight, 0.0, 0.023)))(data)
        manager = FP8GlobalStateManager
        weight = torch.nn.Parameter(quantized(data) if manager.with_fp8_parameters() else data)
        if manager.with_fp8_parameters() and manager.with_high_precision_init_val():
            weight.get_high_precision_init_val = lambda: data
            weight.clear_high_precision_init_val = lambda: None
        self._mark_parallel(weight, 1 if self.parallel_mode == "row" else 0)
        self.register_parameter(name, weight)

    def _add_bias(self, name: str, size: int, dtype: Any) -> None:
        bias = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        if self.parallel_mode == "column":
            self._mark_parallel(bias, 0)
        elif self.parallel_mode == "row":
            bias.sequence_parallel = self.sequence_parallel
        self.register_parameter(name, bias)

    @staticmethod
    def _mark_parallel(parameter: torch.Tensor, dim: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1

    def _gemm(self, inp: torch.Tensor, name: str, is_first_microbatch: bool | None) -> torch.Tensor:
        """inp [..., in] -> [..., out], in the precision of the context that is on."""
        weight = getattr(self, name)
        if not FP8GlobalStateManager.is_fp8_enabled():
            rounded = fake_quantize(weight) if hasattr(weight, "_scale_inv") else weight
            return Gemm.apply(inp, weight, rounded.detach(), None)
        check_fp8_shape(inp, weight)
        is_hybrid = FP8GlobalStateManager.get_fp8_recipe().fp8_format is Format.HYBRID
        grad_dtype = torch.float8_e5m2 if is_hybrid else torch.float8_e4m3fn
        return Gemm.apply(inp, weight, self._rounded(weight, name, is_first_microbatch), grad_dtype)

    def _rounded(self, weight: torch.Tensor, name: str, is_first_microbatch: bool | None) -> torch.Tensor:
        """Return the FP8 weight cached at the last first micro-batch, stale or not, as TE does."""
        if is_first_microbatch is None:
            return fake_quantize(weight)
        if is_first_microbatch or name not in self._fp8_workspaces:
            self._fp8_workspaces[name] = fake_quantize(weight)
        return self._fp8_workspaces[name]

    def _enter(self, inp: torch.Tensor) -> torch.Tensor:
        if self.parallel_mode != "column" or self.tp_size == 1:
            return inp
        if self.sequence_parallel:
            return Exchange.apply(inp, self.tp_group, "gather", "reduce_scatter")
        return Exchange.apply(inp, self.tp_group, "keep", "reduce")

    def _leave(self, out: torch.Tensor) -> torch.Tensor:
        if self.parallel_mode != "row" or self.tp_size == 1:
            return out
        if self.sequence_parallel:
            return Exchange.apply(out, self.tp_group, "reduce_scatter", "gather")
        return Exchange.apply(out, self.tp_group, "reduce", "keep")
