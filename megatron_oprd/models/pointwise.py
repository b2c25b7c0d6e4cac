"""Choose between torch's operators and the kernels of `pointwise_kernels.py`."""

from __future__ import annotations

import functools
import warnings
from types import ModuleType

import torch

from megatron_oprd.runtime.readable import error_line

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def kernels_for(tensor: torch.Tensor) -> ModuleType | None:
    """Return the module with the kernels for a tensor, or None if torch's operators must compute with it."""
    return _compiled_kernels() if tensor.is_cuda and tensor.dtype in KERNEL_DTYPES else None


@functools.cache
def _compiled_kernels() -> ModuleType | None:
    """Return the module if one of its kernels runs. Else return None, after one warning."""
    try:
        from megatron_oprd.models import pointwise_kernels

        pointwise_kernels.swiglu(torch.ones(1, 2, device="cuda"))
    except Exception as error:  # no Triton, no C compiler, or a device that Triton does not know
        reason = error_line(error)
        warnings.warn(
            f"Triton does not work, so rotary embedding and SwiGLU run several kernels each: {reason}", stacklevel=2
        )
        return None
    return pointwise_kernels
