"""Tensor-parallel communication beside the matrix products that need it (`parallel.tp_comm_overlap`).

Transformer Engine does it, in buffers that all tensor-parallel ranks see ("userbuffers"). Nothing here has run: it
needs Transformer Engine and GPUs that reach each other's memory. The calls are those of Megatron-LM's training loop,
for Transformer Engine >= 2.7; the tests hold them against a stand-in alone.
"""

from __future__ import annotations

from typing import Any

from megatron_oprd.config import ParallelConfig, PrecisionConfig


def tp_overlap_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    """What mcore's TransformerConfig is told, beside `sequence_parallel`, which the overlap needs."""
    return {"tp_comm_overlap": True} if parallel.tp_comm_overlap else {}


def start_tp_overlap(parallel: ParallelConfig, precision: PrecisionConfig, *, tokens: int, hidden_size: int) -> None:
    """Make the buffers, once in a process, before the first forward of a model that was built with
    `tp_overlap_arguments`. Collective over the world.

    `tokens`: those that the ranks of a tensor-parallel group hold together in a forward, the same in every one:
    Transformer Engine copies only what fills a buffer.
    """
    from transformer_engine.pytorch import module  # the one place: nothing else here needs it installed

    modes = module.base.UserBufferQuantizationMode
    keeps_bf16 = precision.keep_bf16.first + precision.keep_bf16.last > 0
    wanted = [modes.NONE] if precision.fp8 is None else [modes.FP8, *([modes.NONE] if keeps_bf16 else [])]
    module.base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=parallel.tensor,
        quantization_modes=wanted,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
