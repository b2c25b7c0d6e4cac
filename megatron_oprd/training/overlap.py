"""Reduce gradients while backward runs, and gather parameters while other work runs (`parallel.overlap_*`).

mcore's DDP does both, bucket by bucket. This module adds two cases that mcore does not handle: the gradient of the LM
head does not come from autograd, and rollouts run between the optimizer's update and the student's next forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_oprd.config import ParallelConfig
from megatron_oprd.models.model import HiddenStateModel, Stage


def wrap(stage: Stage, parallel: ParallelConfig, *, distributed: bool) -> list[DistributedDataParallel]:
    """Wrap each chunk in mcore's DDP, and set the functions of the model's configuration that the schedules call.

    `distributed`: True if the optimizer state is divided over the ranks.
    Communicates over: the data-parallel groups, with overlap_param_gather.
    """
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather,  # `start_gather` starts all buckets, no hook does
    )
    # Chunks after the first reduce while others compute. Megatron-LM does not divide them into buckets either.
    ddp = [
        DistributedDataParallel(stage.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(stage)
    ]
    stage.config.no_sync_func = _one_or_all([chunk.no_sync for chunk in ddp])
    if parallel.overlap_grad_reduce:
        if parallel.pipeline > 1:  # all pipeline ranks reduce at the same time, so that no stage waits for another
            stage.config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in ddp])
        for chunk in ddp:
            _exclude_head_from_wait(chunk)
    if parallel.overlap_param_gather:
        for chunk in ddp:
            # Otherwise the first forward of a rank would gather, and replicas generate at different times.
            chunk.start_param_sync(force_sync=True)
            _wait_for_head_at_norm(chunk)
        stage.wait_for_parameters = partial(wait_for_gather, ddp)
    return ddp


def start_gather(ddp: Sequence[DistributedDataParallel]) -> None:
    """Start to gather all updated parameters, if overlap_param_gather is set.

    A module waits for its parameters when it runs. Code that uses parameters outside a module calls
    `Stage.wait_for_parameters`.
    Communicates over: the data-parallel groups.
    """
    for chunk in ddp:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()


def wait_for_gather(ddp: Sequence[DistributedDataParallel]) -> None:
    """Wait until all parameters are gathered. Starts no communication."""
    for group in (group for chunk in ddp for group in _groups(chunk)):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def _exclude_head_from_wait(ddp: DistributedDataParallel) -> None:
    """Let no bucket wait for a gradient of the LM head from autograd.

    The output-space loss adds that gradient to the buffer during forward; the representation loss has none. A tied
    matrix is excluded only if its stage has no embedding, whose gradient comes from autograd.
    """
    chunk: HiddenStateModel = ddp.module
    if chunk.post_process and not (chunk.share_embeddings_and_output_weights and chunk.pre_process):
        group = ddp.param_to_bucket_group.get(chunk.lm_head)
        if group is not None:
            group.params.discard(chunk.lm_head)


def _wait_for_head_at_norm(ddp: DistributedDataParallel) -> None:
    """Wait for the LM head when the final norm runs: the output-space loss uses the head without running its module."""
    chunk: HiddenStateModel = ddp.module
    group = ddp.param_to_bucket_group.get(chunk.lm_head) if chunk.post_process else None
    if group is not None:
        norm = chunk.decoder.final_layernorm
        norm.register_forward_pre_hook(lambda *unused: group.finish_param_sync(skip_next_bucket_dispatch=True))


def _groups(ddp: DistributedDataParallel) -> Iterator[Any]:
    """Yield mcore's groups of buckets. Each group is reduced and gathered at once."""
    yield from ddp.bucket_groups
    yield from ddp.expert_parallel_bucket_groups


def _one_or_all(functions: list[Any]) -> Any:
    """Return the function of the only chunk, or a list for several chunks, as mcore expects."""
    return functions if len(functions) > 1 else functions[0]
