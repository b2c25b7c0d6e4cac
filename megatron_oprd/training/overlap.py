"""Gradients that are reduced while backward still runs, and parameters that are gathered while other work goes on.

mcore's DDP does both, bucket by bucket. What it does not know of is added here: an LM head outside of autograd, and
that an on-policy step does much between the optimizer's update and the student's next forward (`parallel.overlap_*`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from megatron_oprd.config import ParallelConfig
from megatron_oprd.models.model import HiddenStateModel, Stage


def wrap(stage: Stage, parallel: ParallelConfig, *, distributed: bool) -> list[DistributedDataParallel]:
    """mcore's DDP around each chunk, and on the model's configuration what the schedules call for it. `distributed`:
    whether the optimizer is cut over the ranks. Communicates over the data-parallel groups where gathers overlap."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        align_param_gather=parallel.overlap_param_gather,  # `start_gather` starts all: no hook starts the next one
    )
    # Chunks after the first reduce while others compute: Megatron-LM does not cut them into buckets either.
    ddp = [
        DistributedDataParallel(stage.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(stage)
    ]
    stage.config.no_sync_func = _one_or_all([chunk.no_sync for chunk in ddp])
    if parallel.overlap_grad_reduce:
        if parallel.pipeline > 1:  # pipeline ranks reduce at the same time: no stage waits for one that is slowed down
            stage.config.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in ddp])
        for chunk in ddp:
            _wait_for_no_head(chunk)
    if parallel.overlap_param_gather:
        for chunk in ddp:
            # Else the first forward of a rank would gather, which replicas do not reach together while they generate.
            chunk.start_param_sync(force_sync=True)
            _wait_for_head_at_norm(chunk)
    return ddp


def start_gather(ddp: Sequence[DistributedDataParallel]) -> None:
    """Start to gather what the optimizer has updated, all of it, where that overlaps: modules wait for their parameters
    when they run, and `wait_for_gather` is for all who read parameters otherwise. Communicates over the data-parallel
    groups."""
    for chunk in ddp:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()


def wait_for_gather(ddp: Sequence[DistributedDataParallel]) -> None:
    """Wait until the parameters are whole. Starts no communication."""
    for group in (group for chunk in ddp for group in _groups(chunk)):
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def _wait_for_no_head(ddp: DistributedDataParallel) -> None:
    """Let no bucket wait for autograd to bring the gradient of an LM head: an output-space loss adds it to the buffer
    in forward, a loss on hidden states has none. A tied matrix has that of the embedding where both are on one stage.
    """
    chunk: HiddenStateModel = ddp.module
    if chunk.post_process and not (chunk.share_embeddings_and_output_weights and chunk.pre_process):
        group = ddp.param_to_bucket_group.get(chunk.lm_head)
        if group is not None:
            group.params.discard(chunk.lm_head)


def _wait_for_head_at_norm(ddp: DistributedDataParallel) -> None:
    """An output-space loss reads the LM head without running its module: wait for it when the final norm runs."""
    chunk: HiddenStateModel = ddp.module
    group = ddp.param_to_bucket_group.get(chunk.lm_head) if chunk.post_process else None
    if group is not None:
        norm = chunk.decoder.final_layernorm
        norm.register_forward_pre_hook(lambda *unused: group.finish_param_sync(skip_next_bucket_dispatch=True))


def _groups(ddp: DistributedDataParallel) -> Iterator[Any]:
    """mcore's groups of buckets, each reduced and gathered as one."""
    yield from ddp.bucket_groups
    yield from ddp.expert_parallel_bucket_groups


def _one_or_all(functions: list[Any]) -> Any:
    """A function of the only chunk, or a list of those of all: so mcore wants it."""
    return functions if len(functions) > 1 else functions[0]
