"""The modules of a model on Transformer Engine: fused norm and linear layer, fused attention, grouped experts.

Import this file only if Transformer Engine is in use: without it, the classes of Megatron-Core below do not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_oprd.hf.names import FUSED_NORMS
from megatron_oprd.models import micro_batch
from megatron_oprd.models.attention import PackedAttention
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.module_set import ModuleSet
from megatron_oprd.models.rotary import rotate
from megatron_oprd.models.swiglu import SwiGLU


class FusedAttention(PackedAttention):
    """Causal self-attention within each packed sequence, by Transformer Engine's fused kernels.

    A layer with a sliding window uses `PackedAttention`.

    Under context parallelism `cp_comm_type` selects how keys and values are exchanged: in a ring, or all-to-all by
    heads.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, layer_number, **kwargs)
        self.fused = TEDotProductAttention(config, layer_number, attn_mask_type, attention_type, **kwargs)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return [tokens, 1, heads * d] from query [tokens, 1, heads, d], key and value [tokens, 1, groups, d]."""
        if self.window:
            return super().forward(query, key, value, attention_mask, **kwargs)
        batch = micro_batch.of(kwargs)
        assert batch.rotary is not None  # the model computes it before its first layer
        query, key = (rotate(x.squeeze(1), *batch.rotary) for x in (query, key))
        packing = _packing(batch, query.device)
        output: torch.Tensor = self.fused(
            query, key, value.squeeze(1), None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packing
        )
        return output.reshape(len(query), 1, -1)


def _packing(batch: MicroBatch, device: torch.device) -> PackedSeqParams:
    """Return the packing as Transformer Engine's PackedSeqParams, with full lengths also under context parallelism."""
    if batch.fused_packing is None:
        bounds, longest = batch.bounds_on(device)
        padded = bounds if batch.context is not None else None  # needed only under context parallelism
        batch.fused_packing = PackedSeqParams("thd", bounds, bounds, padded, padded, longest, longest)
    return batch.fused_packing


MODULES = ModuleSet(
    norm=TENorm,
    column=TELayerNormColumnParallelLinear,
    fused_norm=True,
    column_without_norm=TEColumnParallelLinear,
    row=TERowParallelLinear,
    core_attention=FusedAttention,
    experts=ModuleSpec(
        TEGroupedMLP,
        submodules=MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear),
    ),
    activation=SwiGLU,
    checkpoint_names=FUSED_NORMS,
)
