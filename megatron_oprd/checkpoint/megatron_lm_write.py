"""Write a model in the form in which Megatron-LM saves checkpoints, which Megatron-Bridge reads, too.

The folder has `latest_checkpointed_iteration.txt` and `release/`, the name for weights without training state.
Layers of one kind are stacked. Dense and sparse layers in one model are separate tensors, as Megatron-LM saves them.
Norms have the names of Transformer Engine's fused modules, which Megatron-Core's local layer spec uses, too.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megatron_oprd.checkpoint.megatron_format import sharded_weights
from megatron_oprd.checkpoint.megatron_lm import LAYER, TRACKER, renamed, stacked
from megatron_oprd.checkpoint.sharded_write import PlannedWrite, plan_write, write_new_folder
from megatron_oprd.checkpoint.stock_names import extra_states, fused_name
from megatron_oprd.hf.names import padded_vocab_size
from megatron_oprd.model_spec import Llama3Scaling, ModelSpec
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime.files import write_text
from megatron_oprd.types import UserError

_RELEASE = "release"
_ARCHITECTURES = (
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "LlamaForCausalLM",
    "Phi3ForCausalLM",
)


def save_megatron_lm(
    stage: torch.nn.ModuleList, folder: str | Path, spec: ModelSpec, topology: Topology, source: str | Path
) -> None:
    """Write the weights of all ranks to a new folder, in the model's dtype, as Megatron-LM saves them.

    `source` is the Hugging Face folder that the arguments name as the tokenizer. Collective over the world. Raises
    UserError on every rank for a folder that is not empty, a disk error, and a model that Megatron-LM has no arguments
    for.
    """
    arguments = megatron_lm_arguments(spec, topology, next(stage.parameters()).dtype, source)

    def plan(partial: Path) -> PlannedWrite:
        on_rank_zero((partial / _RELEASE).mkdir)
        state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0}
        return plan_write({**state, "model": _state(stage, spec, topology)}, partial / _RELEASE)

    write_new_folder(folder, topology, plan, lambda partial: write_text(partial / TRACKER, _RELEASE))


def megatron_lm_arguments(spec: ModelSpec, topology: Topology, dtype: torch.dtype, source: str | Path) -> Namespace:
    """Return the arguments with which Megatron-LM and Megatron-Bridge build the model.

    Raises UserError for a model, or a rotary embedding, that they have no argument for.
    """
    _refuse_without_argument(spec, source)
    scaling = spec.rope_scaling
    theta, sparse = spec.rope_theta, set(spec.sparse_layers)
    return Namespace(
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        group_query_attention=True,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        seq_length=spec.max_position_embeddings,
        max_position_embeddings=spec.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(theta) if theta == int(theta) else theta,
        rotary_percent=spec.rotary_dim / spec.head_dim,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=None,
        use_rope_scaling=scaling is not None,
        rope_scaling_factor=scaling.factor if isinstance(scaling, Llama3Scaling) else 8.0,
        normalization="RMSNorm",
        norm_epsilon=spec.norm_epsilon,
        layernorm_epsilon=spec.norm_epsilon,
        apply_layernorm_1p=False,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        qk_l2_norm=False,
        untie_embeddings_and_output_weights=not spec.tied_embeddings,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        apply_query_key_layer_scaling=False,
        multi_latent_attention=False,
        heterogeneous_layers_config_path=None,
        is_hybrid_model=False,
        mtp_num_layers=None,
        spec=None,
        transformer_impl="transformer_engine",
        num_experts=spec.num_experts or None,
        moe_layer_freq=[int(layer in sparse) for layer in range(spec.num_layers)] if _is_mixed(spec) else 1,
        moe_ffn_hidden_size=spec.moe_ffn_hidden_size or None,
        moe_router_topk=spec.experts_per_token or 2,
        moe_router_pre_softmax=bool(sparse) and not spec.norm_topk_prob,
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        moe_router_topk_scaling_factor=None,
        moe_shared_expert_intermediate_size=spec.shared_ffn_hidden_size or None,
        moe_shared_expert_gate=bool(spec.shared_ffn_hidden_size),
        moe_grouped_gemm=bool(sparse),
        moe_token_dispatcher_type="alltoall",
        vocab_size=spec.vocab_size,
        padded_vocab_size=padded_vocab_size(spec, topology.tensor_size),
        make_vocab_size_divisible_by=1,
        tokenizer_type="HuggingFaceTokenizer",
        tokenizer_model=str(source),
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # The rest has no effect on the weights. Megatron-Bridge reads these arguments without a default.
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        no_persist_layer_norm=False,
        overlap_p2p_comm=False,
        decoder_first_pipeline_num_layers=None,
        decoder_last_pipeline_num_layers=None,
        fp8_param_gather=False,
        fp16_lm_cross_entropy=False,
        bias_swiglu_fusion=True,
        bias_gelu_fusion=False,
        init_method_xavier_uniform=False,
        config_logger_dir="",
        cp_comm_type=["p2p"],
    )


def _refuse_without_argument(spec: ModelSpec, source: str | Path) -> None:
    """Raise UserError for a model, or a rotary embedding, that Megatron-LM has no argument for."""
    if spec.architecture not in _ARCHITECTURES:
        raise UserError(
            f"{source}: {spec.architecture} cannot be written for Megatron-LM; supported: {', '.join(_ARCHITECTURES)}"
        )
    if spec.windowed_layers:
        raise UserError(f"{source}: sliding windows cannot be written for Megatron-LM; use a model without them")
    scaling = spec.rope_scaling
    if scaling is not None and (
        not isinstance(scaling, Llama3Scaling) or scaling != Llama3Scaling(scaling.factor, 1.0, 4.0, 8192)
    ):
        raise UserError(
            f"{source}: Megatron-LM has no argument for this rope scaling ({type(scaling).__name__}); only llama3 with "
            "low_freq_factor 1, high_freq_factor 4 and 8192 original positions can be written for it"
        )


def _is_mixed(spec: ModelSpec) -> bool:
    """Return True if some layers are dense and others are sparse."""
    return 0 < len(spec.sparse_layers) < spec.num_layers


def _state(stage: torch.nn.ModuleList, spec: ModelSpec, topology: Topology) -> dict[str, Any]:
    """Return the sharded state dict of a stage under the names of Megatron-LM, with the empty extra states."""
    state = sharded_weights(stage, topology)
    apply_factories(state)
    sparse, keeps_apart = set(spec.sparse_layers), _is_mixed(spec)

    def relocate(value: Any) -> Any:
        if not isinstance(value, ShardedTensor):
            return value
        layer = LAYER.match(value.key)
        if layer is None:
            return value
        names = [fused_name(value.key) or value.key]
        if ".pre_mlp_layernorm." in value.key and int(layer[1]) in sparse:
            # Before experts, only Megatron-Core's local layer spec calls the norm a part of a linear layer.
            names.append(value.key)
        if keeps_apart:
            return [renamed(value, name) for name in names]
        return [stacked(value, LAYER.sub("decoder.layers.", name), int(layer[1]), spec.num_layers) for name in names]

    dict_list_map_inplace(relocate, state)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    return {**state, **{extra.unique_key: extra for extra in extra_states(tensors, topology)}}
