"""Micro-batches through mcore's pipeline schedules, whose own loss is zero: losses are born at the layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_oprd.models.micro_batch import MicroBatch, Tap
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import PackedBatch


def run_schedule(
    model: torch.nn.Module,
    topology: Topology,
    batches: Sequence[PackedBatch],
    taps: Sequence[Tap],
    *,
    last_layer: int | None,
    normed_layer: int | None,
    forward_only: bool,
) -> None:
    """Run every micro-batch through this rank's stage, with backward unless `forward_only`.

    Ranks of one pipeline pass the same micro-batches, data-parallel ranks the same number of them. Communicates over
    the tensor- and pipeline-parallel groups, and where the model finalises its gradients over the data-parallel one.
    """

    def forward_step(work: Iterator[tuple[PackedBatch, Tap]], stage: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        batch, tap = next(work)
        micro_batch = MicroBatch(
            position_ids=batch.position_ids,
            bounds=tuple(batch.cu_seqlens.tolist()),
            tap=tap,
            last_layer=last_layer,
            normed_layer=normed_layer,
        )
        output = stage(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=micro_batch)
        return output, _no_pipeline_loss

    schedule = get_forward_backward_func(pp_size=topology.pipeline_size, vp_size=None)
    with torch.set_grad_enabled(not forward_only):
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(zip(batches, taps, strict=True)),
            model=[model],
            num_microbatches=len(batches),
            seq_length=1,  # not read: stages tell each other the shapes (`variable_seq_lengths`)
            micro_batch_size=1,
            forward_only=forward_only,
        )


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
