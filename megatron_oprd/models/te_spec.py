"""The layer spec on Transformer Engine: fused norm and linear, fused attention, grouped experts. Imported only where
Transformer Engine is in use; Megatron-Core's classes over it need it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelGroupedLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_oprd.hf.names import FUSED_NORMS
from megatron_oprd.models import micro_batch
from megatron_oprd.models.attention import PackedAttention
from megatron_oprd.models.layer import TappedTransformerLayer
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.rotary import rotate

Norm = TENorm  # the final norm, and those of queries, keys and of what a router reads


class FusedAttention(PackedAttention):
    """Causal self-attention inside each sequence of the micro-batch by Transformer Engine's fused kernels; generation,
    which has a cache, goes over torch's as ever.

    Under context parallelism keys and values travel as `cp_comm_type` says: in a ring, or all to all by heads.
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
        """query [tokens, 1, heads, d], key and value [tokens, 1, groups, d] -> [tokens, 1, heads * d]."""
        batch = micro_batch.of(kwargs)
        if batch.cache is not None:
            return super().forward(query, key, value, attention_mask, **kwargs)
        assert batch.rotary is not None  # the model makes it before its first layer
        query, key = (rotate(x.squeeze(1), *batch.rotary) for x in (query, key))
        packing = _packing(batch, query.device)
        output: torch.Tensor = self.fused(
            query, key, value.squeeze(1), None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packing
        )
        return output.reshape(len(query), 1, -1)


def _packing(batch: MicroBatch, device: torch.device) -> PackedSeqParams:
    """The packing in Transformer Engine's words; lengths are whole under context parallelism too."""
    if batch.fused_packing is None:
        bounds = torch.tensor(batch.bounds, dtype=torch.int32)
        longest, bounds = int(bounds.diff().max()), bounds.to(device)
        padded = bounds if batch.context is not None else None  # asked for there; elsewhere it costs a comparison
        batch.fused_packing = PackedSeqParams("thd", bounds, bounds, padded, padded, longest, longest)
    return batch.fused_packing


def layer_spec(sparse: bool, qk_norm: bool) -> ModuleSpec:
    """A block, with experts where it is `sparse`."""
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=TELayerNormColumnParallelLinear,
            core_attention=FusedAttention,
            linear_proj=TERowParallelLinear,
            q_layernorm=Norm if qk_norm else None,
            k_layernorm=Norm if qk_norm else None,
        ),
    )
    if sparse:
        linears = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
        experts = ModuleSpec(module=TEGroupedMLP, submodules=linears)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    else:
        linears = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
        mlp = ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=TappedTransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm if sparse else IdentityOp,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            # Checkpoints have the names of our own spec whatever stands in a model.
            sharded_state_dict_keys_map={fused: own for fused, own in FUSED_NORMS.items()},
        ),
    )
