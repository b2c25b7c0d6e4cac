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

from megatron_oprd.model_spec import DeltaNet, ModelSpec
from megatron_oprd.models.attention import GatedSelfAttention, PackedAttention
from megatron_oprd.models.delta_net import DeltaNetSubmodules, GatedDeltaNet
from megatron_oprd.models.layer import tapped_layer_spec
from megatron_oprd.models.module_set import ModuleSet
from megatron_oprd.models.norm import RMSNorm
from megatron_oprd.models.swiglu import SwiGLU


def _mlp(linear_fc1: type, activation_func: type | None, linear_fc2: type) -> MLPSubmodules:
    """Return the modules of an MLP. Versions of Megatron-Core order the fields of MLPSubmodules differently."""
    return MLPSubmodules(linear_fc1=linear_fc1, activation_func=activation_func, linear_fc2=linear_fc2)


OWN = ModuleSet(
    RMSNorm,
    ColumnParallelLinear,
    False,
    ColumnParallelLinear,
    RowParallelLinear,
    PackedAttention,
    ModuleSpec(SequentialMLP, submodules=_mlp(ColumnParallelLinear, SwiGLU, RowParallelLinear)),
    activation=SwiGLU,
)


def block_spec(
    spec: ModelSpec, layers: Sequence[int], *, transformer_engine: bool = False
) -> TransformerBlockSubmodules:
    """Return the spec of one model chunk that has `layers` of a model, numbered from 0.

    The spec names the final norm: from a layer spec alone, Megatron-Core would take Transformer Engine's norm as soon
    as Transformer Engine is installed.
    """
    modules = OWN
    if transformer_engine:
        from megatron_oprd.models.te_spec import MODULES as modules  # importing this file needs Transformer Engine
    return TransformerBlockSubmodules([_layer_spec(modules, spec, layer) for layer in layers], layer_norm=modules.norm)


def _layer_spec(modules: ModuleSet, spec: ModelSpec, layer: int) -> ModuleSpec:
    sparse, linear = layer in spec.sparse_layers, layer in spec.linear_layers
    outer_norm = IdentityOp if modules.fused_norm else modules.norm
    mlp = ModuleSpec(MLP, submodules=_mlp(modules.column, modules.activation, modules.row))
    if sparse:
        # Megatron-Core builds the shared expert only if its configuration has a width for it.
        shared = _mlp(modules.column_without_norm, modules.activation, modules.row)
        experts = MoESubmodules(experts=modules.experts, shared_experts=ModuleSpec(SharedExpertMLP, submodules=shared))
        mlp = ModuleSpec(MoELayer, submodules=experts)
    submodules = TransformerLayerSubmodules(
        input_layernorm=outer_norm,
        self_attention=_delta_net(modules, spec.delta_net) if linear else _attention(modules, spec),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=modules.norm if sparse else outer_norm,  # the router, too, gets normalised states
        mlp=mlp,
        mlp_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map=dict(modules.checkpoint_names),
    )
    return tapped_layer_spec(ModuleSpec(TransformerLayer, submodules=submodules))


def _attention(modules: ModuleSet, spec: ModelSpec) -> ModuleSpec:
    submodules = SelfAttentionSubmodules(
        linear_qkv=modules.column,
        core_attention=modules.core_attention,
        linear_proj=modules.row,
        q_layernorm=modules.norm if spec.qk_norm else None,
        k_layernorm=modules.norm if spec.qk_norm else None,
    )
    module = GatedSelfAttention if spec.output_gate else SelfAttention
    return ModuleSpec(module, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)


def _delta_net(modules: ModuleSet, sizes: DeltaNet | None) -> ModuleSpec:
    submodules = DeltaNetSubmodules(in_proj=modules.column, out_proj=modules.row)
    return ModuleSpec(GatedDeltaNet, params={"sizes": sizes}, submodules=submodules)
