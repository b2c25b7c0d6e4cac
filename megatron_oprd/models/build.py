"""From what a Hugging Face config says to a pipeline stage on this rank."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from megatron_oprd import platform
from megatron_oprd.models.model import HiddenStateModel
from megatron_oprd.models.specs import block_spec
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.types import ModelSpec, UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(spec: ModelSpec, topology: Topology, dtype: torch.dtype, num_layers: int) -> TransformerConfig:
    """Megatron's configuration of a model with its lowest `num_layers` blocks. Raises UserError for a layout that
    does not divide the model."""
    check_divisible(spec, topology.tensor_size, topology.pipeline_size, num_layers)
    return TransformerConfig(
        num_layers=num_layers,
        hidden_size=spec.hidden_size,
        ffn_hidden_size=spec.ffn_hidden_size,
        num_attention_heads=spec.num_attention_heads,
        num_query_groups=spec.num_query_groups,
        kv_channels=spec.head_dim,
        layernorm_epsilon=spec.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        # Megatron's defaults are 0.1: distillation compares two deterministic models.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Fused kernels need CUDA extensions that are not there without Transformer Engine.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        use_cpu_initialization=topology.device.type == "cpu",
        perform_initialization=False,
        calculate_per_token_loss=True,
        # Packed micro-batches differ in length, so stages tell each other the shapes; mcore then wants alltoall.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )


def build_model(
    spec: ModelSpec,
    topology: Topology,
    dtype: torch.dtype,
    *,
    num_layers: int | None = None,
    lm_head: bool = True,
    final_norm: bool = True,
) -> HiddenStateModel:
    """This rank's stage of the model, weights not yet loaded. `num_layers` cuts the model above that block."""
    depth = num_layers or spec.num_layers
    config = transformer_config(spec, topology, dtype, depth)
    with platform.cpu_devices():
        model = HiddenStateModel(
            config,
            block_spec(depth // topology.pipeline_size, spec.qk_norm),
            vocab_size=-(-spec.vocab_size // topology.tensor_size) * topology.tensor_size,
            max_positions=spec.max_position_embeddings,
            rope_theta=spec.rope_theta,
            first_stage=topology.is_first_stage,
            last_stage=topology.is_last_stage,
            tied_embeddings=spec.tied_embeddings,
            lm_head=lm_head,
            final_norm=final_norm,
        )
    return model.to(topology.device)


def check_divisible(spec: ModelSpec, tensor: int, pipeline: int, num_layers: int) -> None:
    """Raise UserError, naming what would work, when a layout does not divide the model."""
    for name, count in (("attention heads", spec.num_attention_heads), ("key-value heads", spec.num_query_groups)):
        if count % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide the model's {count} {name}; use one of {_divisors(count)}"
            )
    if spec.ffn_hidden_size % tensor:
        raise UserError(
            f"parallel.tensor={tensor} does not divide the model's intermediate size {spec.ffn_hidden_size}"
        )
    if num_layers % pipeline:
        raise UserError(
            f"parallel.pipeline={pipeline} does not divide {num_layers} layers; use one of {_divisors(num_layers)}"
        )


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
