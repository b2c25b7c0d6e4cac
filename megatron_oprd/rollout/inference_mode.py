"""Context managers that switch off the parts of a training model that generation does not need."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_oprd.models.model import Stage


@contextlib.contextmanager
def without_sequence_parallelism(stage: Stage) -> Iterator[None]:
    """Switch off sequence parallelism and its communication overlap inside the block.

    The few tokens of a decoding step cannot be divided over the ranks.
    """
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    names += ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")  # attributes of Transformer Engine's modules
    holders = [stage.config, *stage.modules()] if stage.config.sequence_parallel else []
    switched = [(holder, name) for holder in holders for name in names if getattr(holder, name, False) is True]
    try:
        for holder, name in switched:
            setattr(holder, name, False)
        yield
    finally:
        for holder, name in switched:
            setattr(holder, name, True)


@contextlib.contextmanager
def without_fp8(stage: Stage) -> Iterator[None]:
    """Compute in the dtype of the weights inside the block, since FP8 products need more than a few rows.

    Megatron-Core checks `config.fp8` at each forward pass. All chunks share one config object.
    """
    before = stage.config.fp8
    stage.config.fp8 = None
    try:
        yield
    finally:
        stage.config.fp8 = before


@contextlib.contextmanager
def without_linear_autograd(stage: Stage) -> Iterator[None]:
    """Replace the autograd functions of Megatron's linear layers by a plain matrix product inside the block.

    These functions run in Python and take a fifth of the time of a small model. The reduction over the tensor-parallel
    group remains.
    """
    linears = [x for x in stage.modules() if isinstance(x, ColumnParallelLinear | RowParallelLinear)]
    columns = [(x, x.disable_grad_reduce) for x in linears if isinstance(x, ColumnParallelLinear)]
    try:
        for linear in linears:
            linear._forward_impl = _multiply
        for column, _ in columns:
            column.disable_grad_reduce = True
        yield
    finally:
        for linear in linears:
            del linear._forward_impl
        for column, before in columns:
            column.disable_grad_reduce = before


def _multiply(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **ignored: object) -> torch.Tensor:
    return torch.nn.functional.linear(input, weight, bias)
