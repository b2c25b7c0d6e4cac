"""Micro-batches through mcore's pipeline schedules, whose own loss is zero: losses are born at the layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_oprd.models.micro_batch import ContextPart, MicroBatch
from megatron_oprd.models.tap_params import Tap
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import progress
from megatron_oprd.types import PackedBatch


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    topology: Topology,
    batches: Sequence[PackedBatch],
    taps: Iterable[Tap],
    *,
    last_layer: int | None,
    normed_layer: int | None,
    forward_only: bool,
) -> None:
    """Run every micro-batch through this rank's chunks of a model, with backward unless `forward_only`.

    Ranks of one pipeline pass the same micro-batches, data-parallel ranks the same number of them. Without pipeline
    parallelism each tap is taken when its micro-batch starts. Communicates over the tensor-, context-, expert- and
    pipeline-parallel groups, and where the model finalises its gradients over the data-parallel ones.
    """

    def forward_step(work: Iterator[tuple[PackedBatch, Tap]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        progress.beat()
        batch, tap = next(work)
        micro_batch = MicroBatch(
            position_ids=batch.position_ids,
            lengths=batch.lengths,
            bounds=tuple(batch.cu_seqlens.tolist()),
            context=_context_part(batch, topology),
            tap=tap,
            last_layer=last_layer,
            normed_layer=normed_layer,
        )
        output = chunk(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=micro_batch)
        return output, _no_pipeline_loss

    virtual_size = topology.virtual_size if topology.virtual_size > 1 else None
    schedule = get_forward_backward_func(pp_size=topology.pipeline_size, vp_size=virtual_size)
    work = [zip(batches, copy, strict=True) for copy in itertools.tee(taps, len(chunks))]
    with torch.set_grad_enabled(not forward_only):
        schedule(
            forward_step_func=forward_step,
            data_iterator=work if virtual_size else work[0],
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=1,  # not read: stages tell each other the shapes (`variable_seq_lengths`)
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _context_part(batch: PackedBatch, topology: Topology) -> ContextPart | None:
    if topology.context_size == 1:
        return None
    return ContextPart(topology.groups.cp, topology.context_rank, topology.context_size, batch.context_order)


def _no_pipeline_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Loss, number of tokens (no divisor comes from it) and nothing to keep: schedules hold on to what they are given
    until the last micro-batch."""
    return _ZeroLoss.apply(output), torch.zeros((), dtype=torch.int, device=output.device), {}


class _ZeroLoss(torch.autograd.Function):
    """Zero, with a gradient of zeros, whatever the output holds (0 * inf would be nan)."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])
