"""Micro-batches through mcore's pipeline schedules. The pipeline's own loss is zero: taps add losses at the layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_oprd.models.micro_batch import ContextPart, MicroBatch
from megatron_oprd.models.tap_params import Tap
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import progress
from megatron_oprd.types import DeviceBatch


@dataclass(frozen=True)
class PassSettings:
    """Settings of a pass through the model."""

    last_layer: int | None = None  # layers above this one (1-based) are skipped; None: all layers run
    normed_layer: int | None = None  # the layer that is tapped after the final norm; None: no layer is
    forward_only: bool = True
    taps_input: bool = False  # True: taps also get the inputs of all stages but the first, as the layers before them


def run_schedule(
    chunks: Sequence[torch.nn.Module],
    topology: Topology,
    micro_batches: Sequence[DeviceBatch],
    taps: Iterable[Tap],
    settings: PassSettings,
) -> None:
    """Run every micro-batch through this rank's chunks of a model.

    Args:
        chunks: this rank's chunks of the model, lowest first.
        topology: the layout of the model.
        micro_batches: the same ones on all ranks of a pipeline, equally many on all data-parallel ranks.
        taps: one for each micro-batch. Without pipeline parallelism it is taken when its micro-batch starts.

    Communicates over: the tensor-, context-, expert- and pipeline-parallel groups; with a backward pass also over the
    data-parallel groups, if the model reduces its gradients.
    """

    def forward_step(work: Iterator[tuple[DeviceBatch, Tap]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        progress.beat()
        batch, tap = next(work)
        micro_batch = MicroBatch(
            position_ids=batch.position_ids,
            lengths=batch.lengths,
            bounds=batch.host.bounds,
            context=_context_part(batch, topology),
            tap=tap,
            last_layer=settings.last_layer,
            normed_layer=settings.normed_layer,
            taps_input=settings.taps_input,
        )
        output = chunk(batch.tokens[None], batch.position_ids[None], None, packed_seq_params=micro_batch)
        return output, _no_pipeline_loss

    virtual_size = topology.virtual_size if topology.virtual_size > 1 else None
    schedule = get_forward_backward_func(pp_size=topology.pipeline_size, vp_size=virtual_size)
    work = [zip(micro_batches, copy, strict=True) for copy in itertools.tee(taps, len(chunks))]
    with torch.set_grad_enabled(not settings.forward_only):
        schedule(
            forward_step_func=forward_step,
            data_iterator=work if virtual_size else work[0],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            seq_length=1,  # ignored: stages send each other the shapes (`variable_seq_lengths`)
            micro_batch_size=1,
            forward_only=settings.forward_only,
        )


def _context_part(batch: DeviceBatch, topology: Topology) -> ContextPart | None:
    if batch.context_order is None:
        return None
    return ContextPart(topology.groups.cp, topology.context_rank, topology.context_size, batch.context_order)


def _no_pipeline_loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Return a zero loss, a zero number of tokens (mcore divides by no count) and nothing to keep.

    Schedules keep what they are given until the last micro-batch.
    """
    return _ZeroLoss.apply(output), torch.zeros((), dtype=torch.int, device=output.device), {}


class _ZeroLoss(torch.autograd.Function):
    """Zero, with a gradient of zeros even if the output is infinite (0 * inf would be nan)."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(output)
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(ctx.saved_tensors[0])
