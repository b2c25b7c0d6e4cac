"""Layer specs for Megatron-Core's GPTModel, from the modules of this package or of Transformer Engine (te_spec.py)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_oprd.models.attention import PackedAttention
from megatron_oprd.models.layer import tapped_layer_spec
from megatron_oprd.models.module_set import ModuleSet
from megatron_oprd.models.norm import RMSNorm
from megatron_oprd.models.swiglu import SwiGLU

OWN = ModuleSet(
    RMSNorm,
    ColumnParallelLinear,
    False,
    ColumnParallelLinear,
    RowParallelLinear,
    PackedAttention,
    ModuleSpec(SequentialMLP, submodules=MLPSubmodules(ColumnParallelLinear, SwiGLU, RowParallelLinear)),
    activation=SwiGLU,
)


def block_spec(
    sparse: Sequence[bool], qk_norm: bool, *, transformer_engine: bool = False
) -> TransformerBlockSubmodules:
    """Return the spec of one model chunk: a layer for each entry of `sparse`, with experts where the entry is True.

    The spec names the final norm: from a layer spec alone, Megatron-Core would take Transformer Engine's norm as soon
    as Transformer Engine is installed.
    """
    modules = OWN
    if transformer_engine:
        from megatron_oprd.models.te_spec import MODULES as modules  # importing this file needs Transformer Engine
    layers = {is_sparse: _layer_spec(modules, is_sparse, qk_norm) for is_sparse in set(sparse)}
    return TransformerBlockSubmodules([layers[is_sparse] for is_sparse in sparse], layer_norm=modules.norm)


def _layer_spec(modules: ModuleSet, sparse: bool, qk_norm: bool) -> ModuleSpec:
    outer_norm = IdentityOp if modules.fused_norm else modules.norm
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=modules.column,
            core_attention=modules.core_attention,
            linear_proj=modules.row,
            q_layernorm=modules.norm if qk_norm else None,
            k_layernorm=modules.norm if qk_norm else None,
        ),
    )
    mlp = ModuleSpec(MLP, submodules=MLPSubmodules(modules.column, modules.activation, modules.row))
    if sparse:
        # Megatron-Core builds the shared expert only if its configuration has a width for it.
        shared = MLPSubmodules(modules.column_without_norm, modules.activation, modules.row)
        experts = MoESubmodules(experts=modules.experts, shared_experts=ModuleSpec(SharedExpertMLP, submodules=shared))
        mlp = ModuleSpec(MoELayer, submodules=experts)
    submodules = TransformerLayerSubmodules(
        input_layernorm=outer_norm,
        self_attention=attention,
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=modules.norm if sparse else outer_norm,  # the router, too, gets normalised states
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=dict(modules.checkpoint_names),
    )
    return tapped_layer_spec(ModuleSpec(TransformerLayer, submodules=submodules))
