"""Build this rank's part of a model from its shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig

from megatron_oprd.config import RecomputeConfig
from megatron_oprd.hf.load import named_parameters, parameter_table
from megatron_oprd.hf.names import padded_vocab_size
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.models.model import HiddenStateModel, Stage
from megatron_oprd.models.precision import PLAIN, ModelPrecision
from megatron_oprd.models.recompute import recomputation_of, set_recomputation
from megatron_oprd.models.rotary import Rotary
from megatron_oprd.models.specs import block_spec
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.runtime import cpu_stand_ins
from megatron_oprd.types import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(
    spec: ModelSpec,
    topology: Topology,
    dtype: torch.dtype,
    stages: Sequence[int],
    recompute: RecomputeConfig,
    precision: ModelPrecision,
) -> TransformerConfig:
    """Return Megatron-Core's configuration of a model with `stages[i]` layers on pipeline stage i.

    Raises UserError if the layout does not divide the model.
    """
    check_divisible(spec, topology.tensor_size, topology.expert_size)
    grouped_experts = precision.transformer_engine and spec.num_experts > 0
    return TransformerConfig(
        num_layers=sum(stages),
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
        attention_output_gate=spec.output_gate,
        layernorm_zero_centered_gamma=spec.zero_centered_norms,
        # Megatron's defaults are 0.1: distillation compares two deterministic models.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Grouped experts multiply by the router's weights in Megatron-Core's fused activation.
        bias_activation_fusion=grouped_experts,
        # The name means that the MLP builds its activation from the layer spec: SwiGLU of this package, not of TE.
        use_te_activation_func=not grouped_experts,
        bias_dropout_fusion=False,  # without bias and dropout, one addition is left
        masked_softmax_fusion=False,
        **_window_arguments(spec, sum(stages)),
        apply_rope_fusion=False,  # the core attention applies the rotary embedding
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,  # needs a CUDA extension of Apex; see training/student.py
        **precision.arguments,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=topology.tensor_size,
        pipeline_model_parallel_size=topology.pipeline_size,
        pipeline_model_parallel_layout=_pipeline_layout(stages) if topology.pipeline_size > 1 else None,
        virtual_pipeline_model_parallel_size=topology.virtual_size if topology.virtual_size > 1 else None,
        # Forward and backward messages are sent separately. Sent together, the messages of two stages on the same two
        # ranks are mistaken for each other.
        overlap_p2p_comm=topology.virtual_size > 1,
        batch_p2p_comm=topology.virtual_size == 1,
        context_parallel_size=topology.context_size,
        sequence_parallel=topology.sequence_parallel,
        **_expert_arguments(spec, topology, sum(stages), grouped=precision.transformer_engine),
        **_recompute_arguments(recompute),
        use_cpu_initialization=topology.device.type == "cpu",
        perform_initialization=False,
        calculate_per_token_loss=True,
        # Packed micro-batches differ in length, so stages send their shapes first; Megatron-Core then needs alltoall.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
    )


@dataclass(frozen=True)
class ModelPart:
    """The part of a model that is built."""

    stages: Sequence[int] | None = None  # layers on each pipeline stage, lowest first; None: all, divided evenly
    lm_head: bool = True
    final_norm: bool = True


WHOLE_MODEL = ModelPart()


def build_model(
    spec: ModelSpec,
    topology: Topology,
    dtype: torch.dtype,
    part: ModelPart = WHOLE_MODEL,
    *,
    recompute: RecomputeConfig | None = None,
    precision: ModelPrecision = PLAIN,
) -> Stage:
    """Build this rank's chunks of a model. The weights are not loaded. `topology` must be active.

    Args:
        spec: The shape of the model.
        topology: The layout.
        dtype: The dtype of the weights.
        part: The layers that are built. Layers above the sum of `part.stages` are left out.
        recompute: Recomputation of activations; None: no recomputation.
        precision: The module set, and the FP8 settings.

    Communicates over: the embedding group if a tied model has several pipeline stages.

    Raises:
        UserError: The layout does not divide the model.
    """
    stages = part.stages or even_stages(spec.num_layers, topology.pipeline_size, topology.virtual_size)
    recompute = recompute or RecomputeConfig()
    check_recompute(recompute, stages, topology.pipeline_size)
    config = transformer_config(spec, topology, dtype, stages, recompute, precision)
    chunks = []
    for chunk, number in enumerate(topology.stages):
        first_layer = sum(stages[:number])
        layers = range(first_layer, first_layer + stages[number])
        with cpu_stand_ins.cpu_devices():
            model = HiddenStateModel(
                config,
                block_spec(spec, layers, transformer_engine=precision.transformer_engine),
                vocab_size=padded_vocab_size(spec, topology.tensor_size),
                max_positions=spec.max_position_embeddings,
                rotary=Rotary(spec),
                first_stage=number == 0,
                last_stage=number == topology.num_stages - 1,
                tied_embeddings=spec.tied_embeddings,
                lm_head=part.lm_head,
                final_norm=part.final_norm,
                chunk=chunk if topology.virtual_size > 1 else None,
                first_layer=first_layer,
                first_expert=topology.expert_rank * (spec.num_experts // topology.expert_size),
            )
        model.model_type = ModelType.encoder_or_decoder  # required by the interleaved schedule
        chunks.append(model)
    stage = Stage(chunks)
    chosen = recomputation_of(recompute, topology.pipeline_rank)
    if chosen is not None:
        set_recomputation(stage, chosen)
    _mark_parameters(stage, spec)
    return stage.to(topology.device)


def check_divisible(spec: ModelSpec, tensor: int, expert: int = 1, key: str = "parallel", model: str = "model") -> None:
    """Raise UserError if tensor or expert parallelism does not divide the model.

    In the message, `key` is the section of the configuration and `model` the name of the model.
    """
    if expert > 1 and spec.num_experts % expert:
        works = ", ".join(str(d) for d in range(1, spec.num_experts + 1) if spec.num_experts % d == 0)
        raise UserError(
            f"{key}.expert={expert} does not divide the {model}'s {spec.num_experts} experts; use one of {works}"
        )
    divided = {
        "attention heads": spec.num_attention_heads,
        "key-value heads": spec.num_query_groups,
        "intermediate size": spec.ffn_hidden_size,
        "key heads of Gated DeltaNet": spec.delta_net.num_key_heads if spec.delta_net else 0,
        "shared expert's intermediate size": spec.shared_ffn_hidden_size,
    }
    for name, count in divided.items():
        if count % tensor:
            common = math.gcd(*divided.values())
            works = ", ".join(str(d) for d in range(1, common + 1) if common % d == 0)
            raise UserError(f"{key}.tensor={tensor} does not divide the {model}'s {name} ({count}); use one of {works}")


def check_recompute(recompute: RecomputeConfig | None, stages: Sequence[int], pipeline: int = 1) -> None:
    """Raise UserError if what is recomputed does not suit the blocks of each stage or the number of pipeline ranks.

    Recomputed chunks must divide a stage: Megatron-Core would index past its last layer.
    """
    if recompute is None:
        return
    if recompute.stages is not None and len(recompute.stages) != pipeline:
        raise UserError(
            f"recompute.stages has {len(recompute.stages)} entries for {pipeline} pipeline ranks; write one for each"
        )
    if recompute.granularity != "full" or recompute.method != "uniform":
        return
    if any(blocks % recompute.num_layers for blocks in stages):
        common = math.gcd(*stages)
        works = " or ".join(str(d) for d in range(1, common + 1) if common % d == 0)
        raise UserError(
            f"recompute.num_layers={recompute.num_layers} does not divide the blocks of every pipeline stage "
            f"({', '.join(map(str, stages))}); use {works}, or recompute.method=block"
        )


def _pipeline_layout(stages: Sequence[int]) -> list[list[str]]:
    layout = [["decoder"] * blocks for blocks in stages]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _recompute_arguments(recompute: RecomputeConfig) -> dict[str, Any]:
    if recompute.parts:  # `set_recomputation` sets these
        return {}
    if recompute.granularity == "full":
        return {
            "recompute_granularity": "full",
            "recompute_method": recompute.method,
            "recompute_num_layers": recompute.num_layers,
        }
    return {"recompute_granularity": "selective"} if recompute.granularity == "selective" else {}


def _expert_arguments(spec: ModelSpec, topology: Topology, num_layers: int, *, grouped: bool) -> dict[str, Any]:
    if not spec.num_experts:
        return {}
    return {
        "num_moe_experts": spec.num_experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_ffn_hidden_size": spec.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": spec.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": spec.shared_ffn_hidden_size > 0,
        # The softmax is over all experts, or over the chosen experts, whose weights then sum to one.
        "moe_router_pre_softmax": not spec.norm_topk_prob,
        "moe_router_load_balancing_type": "none",  # the student learns the teacher's hidden states, not a balanced load
        "moe_layer_freq": [int(layer in spec.sparse_layers) for layer in range(num_layers)],
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": topology.expert_size,
        "expert_tensor_parallel_size": 1,
    }


def _window_arguments(spec: ModelSpec, num_layers: int) -> dict[str, Any]:
    if not spec.windowed_layers:
        return {}
    return {
        "window_size": (spec.sliding_window - 1, 0),  # tokens before and after a token to which it attends
        "window_attn_skip_freq": [int(layer in spec.windowed_layers) for layer in range(num_layers)],
    }


def _mark_parameters(stage: Stage, spec: ModelSpec) -> None:
    """Mark the parameters that are tensor-parallel shards, and the parameters of experts.

    Megatron-Core marks shards only if it initialises them. Without the mark, the gradient norm counts only the first
    rank's shard. Megatron-Core marks experts only if they are distributed over ranks. Without the mark, gradients would
    not be summed over tensor-parallel ranks with copies, and the optimizer state would depend on the layout.
    """
    table = parameter_table(spec)
    for name, parameter in named_parameters(stage).items():
        entry = table[name]
        if entry.layout != "copy" and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, True, 1 if entry.layout == "columns" else 0, 1)
        if entry.expert is not None:
            parameter.allreduce = False  # reduced over the experts' own data-parallel group instead
