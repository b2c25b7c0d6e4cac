"""Functions of tensors that are compiled on a GPU, where one kernel then replaces several. No communication."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from megatron_oprd.runtime.readable import error_line

Result = TypeVar("Result")


def fused(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return `function`, which torch.compile compiles at its first call with CUDA tensors.

    A new length of the first dimension, the tokens, does not compile it again. On other devices the function runs as
    it is written: compiling takes seconds and gains nothing there. It also does where Triton or a C compiler is
    missing, after one warning.

    Args:
        function: computes tensors from tensors and numbers. It must not communicate, and autograd must not record it.
    """
    compiled: Callable[..., Result] | None = None
    works = True

    @functools.wraps(function)
    def call(*args: Any) -> Result:
        nonlocal compiled, works
        if not works or not args[0].is_cuda or torch.compiler.is_compiling():
            return function(*args)
        if compiled is None:
            compiled = torch.compile(function)
        for tensor in args:
            if torch.is_tensor(tensor) and tensor.dim() and len(tensor) > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return compiled(*args)
        except torch._dynamo.exc.TorchDynamoException as error:
            works = False
            reason = error_line(error)
            warnings.warn(f"torch.compile fails, so {function.__name__} runs several kernels: {reason}", stacklevel=2)
            return function(*args)

    return call
