"""What a training model does that generation does not want, switched off for the time of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_oprd.models.model import Stage


@contextlib.contextmanager
def whole_tokens(stage: Stage) -> Iterator[None]:
    """Switch sequence parallelism off inside the block, and with it what overlaps: a few tokens a step do not divide
    over the ranks."""
    names = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
    names += ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")  # of Transformer Engine's modules
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
    """Compute in the weights' own dtype inside the block: FP8 takes no products of a few rows. Megatron-Core asks the
    configuration, one object for all chunks, at each forward."""
    before = stage.config.fp8
    stage.config.fp8 = None
    try:
        yield
    finally:
        stage.config.fp8 = before


@contextlib.contextmanager
def plain_linears(stage: Stage) -> Iterator[None]:
    """Multiply without Megatron's autograd functions inside the block. They prepare a backward that does not come and
    run in Python: a fifth of the time of a small model. The reduction over the tensor-parallel group stays."""
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
