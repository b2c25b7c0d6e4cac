"""Device choice, and what lets Megatron-Core run on a CPU with gloo. Nothing else in the package knows about it.

Megatron-Core asks for `cuda` by name: as a device, in `torch.cuda.*` calls and in dtype strings. Without a CUDA
device, `install_cpu_stand_ins` answers those calls once for the whole process; with one, nothing here is active.
"""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch.overrides import TorchFunctionMode

from megatron_oprd.types import UserError

# Said at every start by Megatron-Core and torch about each other; nothing that a user of this package could change.
for _message, _module in (
    (r"full scope is deprecated", r"megatron\.core"),
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core"),
    (r"`load_state_dict` is deprecated", r"megatron\.core"),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed"),
    (r"`sequence_parallel` is set to `True`", r"megatron\.core"),  # of experts, which are never cut
):
    warnings.filterwarnings("ignore", message=_message, module=_module)
if not torch.cuda.is_available():
    # About CUDA alone. The first is said at import, five times over.
    warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed", module=r"megatron\.core")
    warnings.filterwarnings("ignore", message=r".*CUDA_DEVICE_MAX_CONNECTIONS", module=r"megatron\.core")


def choose_device(requested: str) -> torch.device:
    """The device of this process for `train.device`: auto, cpu or cuda (the local rank's). No communication.

    Raises UserError when cuda is asked for and there is none.
    """
    if requested == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda: this machine has no CUDA device; use train.device=cpu or auto")
    if requested == "cpu" and torch.cuda.is_available():
        raise UserError(
            "train.device=cpu: hide the CUDA devices first (CUDA_VISIBLE_DEVICES=''), Megatron-Core takes them"
        )
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def distributed_backend(device: torch.device) -> str:
    """The torch.distributed backend of a device: nccl on CUDA, gloo on a CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


@functools.cache
def install_cpu_stand_ins() -> None:
    """Answer Megatron-Core's torch.cuda calls on a machine without CUDA. Does nothing with a CUDA device, or twice."""
    if torch.cuda.is_available():
        return
    _patch_torch_cuda()
    _patch_tensor()
    _patch_rng()
    _patch_schedules()
    _patch_experts()


@contextlib.contextmanager
def cpu_devices() -> Iterator[None]:
    """Map the device `cuda` in torch calls to `cpu` inside the block (a no-op with CUDA).

    Held only where Megatron-Core builds modules, buffers or optimizers: every torch call inside goes through Python,
    which costs about a quarter of the time of a tiny model.
    """
    if torch.cuda.is_available():
        yield
        return
    install_cpu_stand_ins()
    with _CudaMeansCpu():
        yield


class _CudaMeansCpu(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if func is torch.Tensor.to:
            args = tuple(_on_cpu(a) if isinstance(a, (str, torch.device)) else a for a in args)
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    """`cuda`, `cuda:1`, a CUDA torch.device and a bare device index all become `cpu`; anything else stays."""
    if isinstance(device, int) and not isinstance(device, bool):
        return "cpu"
    return "cpu" if str(device).startswith("cuda") else device


class _Stream:
    """A class, not a function: transformers evaluates `torch.cuda.Stream | None` when it is imported."""

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
    nothing = {
        name: lambda *args, **kwargs: None
        for name in ("synchronize", "empty_cache", "set_device", "manual_seed", "reset_peak_memory_stats")
    }
    values: dict[str, Any] = {
        **nothing,
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda *args: _Stream(),
        "default_stream": lambda *args: _Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
        "Stream": _Stream,
        "Event": _Event,
        # Megatron-Core seeds and forks one "CUDA" generator; on a CPU that is torch's default one.
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    for name, value in values.items():
        setattr(torch.cuda, name, value)


def _patch_tensor() -> None:
    # gloo and the modules stay where they are; `type()` is what Megatron's DDP and optimizers sort parameters by.
    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            # Under a function mode torch looks `type` up by name and comes here a second time.
            return "torch.cuda." + original_type(self).removeprefix("torch.").removeprefix("cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment, misc]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign, assignment, misc]


def _patch_rng() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


class _TorchForSchedules(types.ModuleType):
    """torch as the pipeline schedules see it: they make one counter on `cuda` by name. Answering that one call here
    spares every layer's forward and backward the function mode."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, device=_on_cpu(device), **kwargs)


def _patch_schedules() -> None:
    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _TorchForSchedules("torch")


def _patch_experts() -> None:
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):  # tested against None, but defined only with Transformer Engine
        moe_utils.te_general_gemm = None
    move = moe_utils.maybe_move_tensor_to_cpu

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        """mcore's leaves a tensor that is on the CPU already a tensor, numpy wanted or not."""
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return move(tensor, as_numpy, record_stream)

    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu


def free_memory_bytes(device: torch.device) -> int:
    """Memory that is free for this process: of the CUDA device, or its share of the machine's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak for `peak_memory_bytes`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # Linux: resets the high-water mark of resident memory


def peak_memory_bytes(device: torch.device) -> int:
    """Peak since `reset_peak_memory`: allocated on the CUDA device, or resident on a CPU (of the whole process)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
