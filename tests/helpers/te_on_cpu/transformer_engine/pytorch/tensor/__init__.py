"""Tensors held in FP8: a byte an element and one factor, seen by torch as the values that these stand for."""

from __future__ import annotations

import torch

from ...on_cpu import scale_and_round


class QuantizedTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # what is computed from one is a plain tensor

    def dequantize(self, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.Tensor.detach(self).as_subclass(torch.Tensor).to(dtype or self.dtype)

    def quantize_(self, tensor: torch.Tensor) -> QuantizedTensor:
        self._data, self._scale_inv = scale_and_round(tensor)
        with torch.no_grad():
            torch.Tensor.copy_(self, self._data.float() * self._scale_inv)
        return self

    def copy_(self, src: torch.Tensor, non_blocking: bool = False) -> QuantizedTensor:
        return self.quantize_(src)

    def detach(self) -> QuantizedTensor:
        new = torch.Tensor.detach(self).as_subclass(type(self))
        new._data, new._scale_inv = self._data, self._scale_inv
        return new


class Float8Tensor(QuantizedTensor):
    pass
