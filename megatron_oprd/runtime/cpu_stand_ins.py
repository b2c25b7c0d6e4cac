"""Stand-ins that let Megatron-Core run on a CPU with gloo.

Megatron-Core names `cuda` in device arguments, in `torch.cuda.*` calls and in dtype strings. On a machine without a
CUDA device, `install` replaces the calls for the whole process and `cpu_devices` replaces device arguments inside a
block. On a machine with a CUDA device both do nothing.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from megatron_oprd.runtime.megatron_import import import_megatron

import_megatron()


@functools.cache
def install() -> None:
    """Replace the `torch.cuda` calls of Megatron-Core. Does nothing on a machine with CUDA, nor a second time."""
    if torch.cuda.is_available():
        return
    _patch_torch_cuda()
    _patch_tensor()
    _patch_generators()
    _patch_schedules()
    _patch_experts()


@contextlib.contextmanager
def cpu_devices() -> Iterator[None]:
    """Map the device `cuda` in torch calls to `cpu` inside the block.

    Use the block only where Megatron-Core builds modules, buffers or optimizers. Every torch call inside goes through
    Python, which would cost about a quarter of the time of a tiny model.
    """
    if torch.cuda.is_available():
        yield
        return
    install()
    with _CudaMeansCpu():
        yield


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _to_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_to_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args)
        return func(*args, **kwargs)


def _to_cpu(device: Any) -> Any:
    """Return `cpu` for `cuda`, `cuda:1`, a CUDA torch.device and a device index; return other devices unchanged."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    return "cpu" if str(device).startswith("cuda") else device


class _Stream:
    """Replace torch.cuda.Stream. A class, because transformers evaluates `torch.cuda.Stream | None` at import."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...
    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True


def _patch_torch_cuda() -> None:
    without_effect = {
        name: lambda *args, **kwargs: None
        for name in ("synchronize", "empty_cache", "set_device", "manual_seed", "reset_peak_memory_stats")
    }
    stand_ins: dict[str, Any] = {
        **without_effect,
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "Stream": _Stream,
        "Event": _Event,
        # Megatron-Core seeds and forks the generator of the CUDA device; on a CPU that is torch's default generator.
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, stand_in in stand_ins.items():
        setattr(torch.cuda, name, stand_in)


def _patch_tensor() -> None:
    """Make `Tensor.type()` return CUDA names and `cuda()` return self.

    Megatron's DDP and optimizers group parameters by the name that `type()` returns.
    """
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            # Under a function mode torch looks `type` up by name and calls this function a second time.
            return "torch.cuda." + original_type(self).removeprefix("torch.").removeprefix("cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment, misc]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment, misc]


def _patch_generators() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class _TorchForSchedules(types.ModuleType):
    """Replace the name `torch` inside Megatron's pipeline schedules, which make one counter on `cuda`.

    Replacing this single call keeps every layer's forward and backward outside `cpu_devices`, which is slow.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, device=_to_cpu(device), **kwargs)


def _patch_schedules() -> None:
    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _TorchForSchedules("torch")


def _patch_experts() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # compared with None, but only defined with Transformer Engine
        moe_utils.te_general_gemm = None
    move = moe_utils.maybe_move_tensor_to_cpu

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """Return a NumPy array if asked to; Megatron's function returns a tensor that is on the CPU unchanged."""
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu
