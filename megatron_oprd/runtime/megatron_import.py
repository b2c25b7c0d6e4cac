"""Import Megatron-Core without torch's compiler and without the warnings that no user of this package can act on."""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Messages that Megatron-Core and torch print at every start, with the module that prints each.
IGNORED_WARNINGS = (
    (r"full scope is deprecated", r"megatron\.core"),
    (r"The \.grad attribute of a Tensor that is not a leaf", r"megatron\.core"),
    (r"`load_state_dict` is deprecated", r"megatron\.core"),
    (r"`torch\.distributed\.\w+` is deprecated", r"torch\.distributed"),
    (r"Please use DTensor instead", r"torch\.distributed"),
    (r"Using a large number of experts .* without fp32 routing", r"megatron\.core"),
    (r"`sequence_parallel` is set to `True`", r"megatron\.core"),  # for experts, which are never split
)
# Messages about optional CUDA packages and CUDA settings, ignored on a machine without a CUDA device.
IGNORED_ON_CPU = (
    (r".*Apex (is|are) not installed", r"megatron\.core"),
    (r".*CUDA_DEVICE_MAX_CONNECTIONS", r"megatron\.core"),
    (r"If you are using transformer_engine .* core_attn", r"megatron\.core"),
)


@functools.cache
def import_megatron() -> None:
    """Import Megatron-Core quickly and quietly. Call this function before anything else imports `megatron.core`."""
    on_cpu = not torch.cuda.is_available()
    for message, module in IGNORED_WARNINGS + IGNORED_ON_CPU if on_cpu else IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    if on_cpu:  # a CUDA build of torch logs that it found nvcc and no device
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with _compile_on_first_call(), _without("wandb"):
        import megatron.core  # noqa: F401


@contextlib.contextmanager
def _without(package: str) -> Iterator[None]:
    """Make `import package` fail, as if the package were not installed.

    Megatron-Core imports wandb, half a second, for its timers and inference engine alone. Nothing here uses them.
    """
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextlib.contextmanager
def _compile_on_first_call() -> Iterator[None]:
    """Make `torch.compile` import torch's compiler when a decorated function is first called, not when it is defined.

    Megatron-Core decorates about 40 functions while it is imported, and compiling one imports torch._dynamo and
    torch._inductor, which takes seconds. Without a CUDA device nothing is compiled: the only decorated function that
    runs there, `Router._apply_expert_bias`, returns at once.
    """
    compile_now = torch.compile

    def decorate(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(decorate, **options)
        if isinstance(function, torch.nn.Module):
            return compile_now(function, **options)
        return _compile_later(function, lambda: compile_now(function, **options))

    torch.compile = decorate  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def _compile_later(function: Callable[..., Any], compile_function: Callable[[], Any]) -> Callable[..., Any]:
    """Return a function that behaves like the compiled `function` and compiles at its first call."""
    compiled: Any = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        # Inside another compiled function, both are compiled as one.
        if torch.compiler.is_compiling() or not torch.cuda.is_available():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = compile_function()
        return compiled(*args, **kwargs)

    return call
