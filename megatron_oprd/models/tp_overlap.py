"""Overlap tensor-parallel communication with matrix products (`parallel.tp_comm_overlap`).

Transformer Engine does this in buffers that all tensor-parallel ranks share ("userbuffers"). This code has never run on
GPUs: it needs Transformer Engine and several GPUs that access each other's memory. Its calls are those of Megatron-LM's
training loop for Transformer Engine >= 2.7. The tests compare them with a stand-in only.
"""

from __future__ import annotations

from typing import Any

from megatron_oprd.config import ParallelConfig, PrecisionConfig


def tp_overlap_arguments(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the TransformerConfig arguments of the overlap, besides `sequence_parallel`, which the overlap needs."""
    return {"tp_comm_overlap": True} if parallel.tp_comm_overlap else {}


def start_tp_overlap(parallel: ParallelConfig, precision: PrecisionConfig, *, tokens: int, hidden_size: int) -> None:
    """Create the buffers once, before a model with `tp_overlap_arguments` runs. Collective over the world.

    Args:
        parallel: The student's layout.
        precision: Decides whether the buffers are for FP8, for bf16 or for both.
        tokens: The tokens of a tensor-parallel group in a forward pass. Every forward pass must have this number,
            because Transformer Engine copies only tensors that fill a buffer.
        hidden_size: The student's hidden size.
    """
    from transformer_engine.pytorch import module  # imported here, because only the overlap needs it

    modes = module.base.UserBufferQuantizationMode
    keeps_bf16 = precision.keep_bf16.first + precision.keep_bf16.last > 0
    quantization_modes = [modes.NONE] if precision.fp8 is None else [modes.FP8, *([modes.NONE] if keeps_bf16 else [])]
    module.base.initialize_ub(
        shape=[tokens, hidden_size],
        tp_size=parallel.tensor,
        quantization_modes=quantization_modes,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
