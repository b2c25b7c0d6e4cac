"""Remember the results of operations on tensors without values, which depend on the sizes of the inputs alone.

A trace repeats the same operations for each block and each chunk of tokens. A FakeTensorMode computes a result in about
200 microseconds, which would be most of the time of a trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

_NUMBERS = (int, float, str)
_CONSTANTS = (type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class _Output:
    """A tensor that an operation returned: an input, a view of an input, or a new tensor."""

    source: int  # number of the input, or -1 for a new tensor
    is_input: bool
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Result:
    outputs: tuple[_Output, ...]
    container: type | None  # None: the result is the only output


class KnownResults:
    """Compute each operation once for inputs of the same sizes, and repeat its result afterwards."""

    def __init__(self) -> None:
        self._known: dict[Any, _Result | None] = {}  # None: such a result cannot be repeated

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None, inputs: Sequence[Any]) -> Any:
        """Return `func(*args, **kwargs)` for an operation of torch. `inputs`: the tensors among its arguments."""
        try:
            key = (func, _described(args), _described(tuple(kwargs.items())) if kwargs else None)
        except _NotRepeatable:
            return func(*args, **(kwargs or {}))
        known = self._known.get(key)
        if known is not None:
            return _repeated(known, inputs)
        result = func(*args, **(kwargs or {}))
        if inputs and key not in self._known:
            unchanged = key[1] == _described(args)  # an operation like `transpose_` changes the sizes of its input
            self._known[key] = _known_result(result, inputs) if unchanged else None
        return result


class _NotRepeatable(Exception):
    """An argument, like a process group, on which more than sizes may depend."""


def _described(value: Any) -> Any:
    """Return a hashable description of an argument, equal for arguments with the same result."""
    if isinstance(value, torch.Tensor):
        if type(value) is not FakeTensor or value.constant is not None:
            raise _NotRepeatable
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if isinstance(value, _NUMBERS):
        return type(value), value  # 1 == 1.0 == True
    if isinstance(value, _CONSTANTS):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    raise _NotRepeatable


def _known_result(result: Any, inputs: Sequence[torch.Tensor]) -> _Result | None:
    container = None if isinstance(result, torch.Tensor) else type(result)
    if container not in (None, list, tuple):
        return None
    outputs = (result,) if container is None else tuple(result)
    described = tuple(_known_output(output, inputs) for output in outputs)
    storages = {output.untyped_storage()._cdata for output in outputs if isinstance(output, torch.Tensor)}
    new = sum(output is not None and output.source < 0 for output in described)
    if None in described or (new and len(storages) < len(outputs)):  # new tensors share a storage
        return None
    return _Result(described, container)


def _known_output(output: Any, inputs: Sequence[torch.Tensor]) -> _Output | None:
    if type(output) is not FakeTensor or output.constant is not None:
        return None
    storage = output.untyped_storage()
    same = [number for number, tensor in enumerate(inputs) if tensor is output]
    views = [number for number, tensor in enumerate(inputs) if tensor.untyped_storage()._cdata == storage._cdata]
    source = next(iter(same or views), -1)
    shape, stride, offset = tuple(output.shape), output.stride(), output.storage_offset()
    elements = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if output.numel() else 0
    if source < 0 and (offset or storage.nbytes() != elements * output.dtype.itemsize):
        return None
    return _Output(source, bool(same), shape, stride, offset, output.dtype, output.fake_device)


def _repeated(known: _Result, inputs: Sequence[Any]) -> Any:
    outputs = [_new_output(output, inputs) for output in known.outputs]
    return outputs[0] if known.container is None else known.container(outputs)


def _new_output(output: _Output, inputs: Sequence[Any]) -> FakeTensor:
    if output.is_input:
        tensor: FakeTensor = inputs[output.source]
        return tensor
    mode = inputs[0].fake_mode
    with in_kernel_invocation_manager(mode):
        if output.source < 0:
            tensor = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        else:
            storage = inputs[output.source].untyped_storage()
            tensor = torch.empty(0, dtype=output.dtype, device="meta")
            tensor.set_(storage, output.offset, output.shape, output.stride)
    return FakeTensor(mode, tensor, output.device)
