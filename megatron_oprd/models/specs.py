"""Layer specs: which module stands where in mcore's GPTModel. Without Transformer Engine they are our own; those on
it are in `te_spec.py`."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_oprd.models.attention import PackedAttention
from megatron_oprd.models.layer import TappedTransformerLayer
from megatron_oprd.models.norm import RMSNorm


def block_spec(
    sparse: Sequence[bool], qk_norm: bool, *, transformer_engine: bool = False
) -> TransformerBlockSubmodules:
    """The spec of one chunk of the model: a layer for each entry of `sparse`, with experts where it is true.

    The final norm is named too: given a bare layer spec, mcore takes Transformer Engine's norm once that is installed.
    """
    norm, layer_spec = RMSNorm, _own_layer_spec
    if transformer_engine:
        from megatron_oprd.models import te_spec

        norm, layer_spec = te_spec.Norm, te_spec.layer_spec
    layers = {is_sparse: layer_spec(is_sparse, qk_norm) for is_sparse in set(sparse)}
    return TransformerBlockSubmodules(layer_specs=[layers[is_sparse] for is_sparse in sparse], layer_norm=norm)


def _own_layer_spec(sparse: bool, qk_norm: bool) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=PackedAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if qk_norm else None,
            k_layernorm=RMSNorm if qk_norm else None,
        ),
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if sparse:
        experts = ModuleSpec(module=SequentialMLP, submodules=linears)
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts))
    else:
        mlp = ModuleSpec(module=MLP, submodules=linears)
    return ModuleSpec(
        module=TappedTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
