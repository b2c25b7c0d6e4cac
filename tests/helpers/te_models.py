"""Megatron-Core's own GPTModel, of its TE spec or its local one, the same weights in both, and what a run gives."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig

from megatron_oprd.runtime import cpu_stand_ins

LENGTHS = (16, 8, 24)
TOKENS = sum(LENGTHS)
VOCAB = 128
SIZES: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "qk_layernorm": True,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "init_method_std": 0.1,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 32,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}


def build(spec: str, *, vocabulary: int = VOCAB, tied: bool = False, **settings: Any) -> GPTModel:
    """Build a GPTModel of the "te" or the "local" spec on the active layout, with random weights and norms.

    A list as `moe_layer_freq` makes some layers dense.
    """
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = TransformerConfig(**{**SIZES, "tensor_model_parallel_size": size, **settings})
    if config.num_moe_experts and isinstance(config.moe_layer_freq, list):
        layers = get_gpt_decoder_block_spec(config, use_transformer_engine=spec == "te", normalization="RMSNorm")
    else:
        make = get_gpt_layer_with_transformer_engine_spec if spec == "te" else get_gpt_layer_local_spec
        grouped = settings.get("moe_grouped_gemm", False)
        kwargs = {
            "num_experts": config.num_moe_experts,
            "moe_grouped_gemm": grouped,
            "qk_layernorm": config.qk_layernorm,
        }
        layers = make(**kwargs, **({} if spec == "te" else {"normalization": "RMSNorm"}))
    mtp = get_gpt_mtp_block_spec(config, layers, spec == "te") if config.mtp_num_layers else None
    with cpu_stand_ins.cpu_devices():
        model = GPTModel(
            config,
            layers,
            vocabulary,
            64,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            mtp_block_spec=mtp,
        )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
            elif "norm" not in name and spec == "local":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def te_name(name: str) -> str:
    """Return the name in the TE spec of a parameter of the local spec; fused linears contain the norms before them."""
    name = name.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
    return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def cut(name: str, full: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a full parameter; gate and up projection of fc1 are cut separately."""
    rank, size = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    if size == 1 or not getattr(target, "tensor_model_parallel", False):
        return full
    if "linear_fc1" in name:
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, dim=target.partition_dim)[rank]


def load(model: GPTModel, weights: dict[str, torch.Tensor]) -> GPTModel:
    """Fill a TE model from the parameters of the local one."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {te_name(name) for name in weights}
    with torch.no_grad():
        for name, full in weights.items():
            target = parameters[te_name(name)]
            target.copy_(cut(name, full, target))
    return model


def tokens() -> torch.Tensor:
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(2))


def run(model: GPTModel, packed: bool = True) -> torch.Tensor:
    """Logits [TOKENS, VOCAB] of the sequences: packed into one, or each by itself. Gradients of a fixed weighted sum
    of them stay in the parameters."""
    model.zero_grad()
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    if packed:
        bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
        params = PackedSeqParams("thd", bounds, bounds, bounds, bounds, max(LENGTHS), max(LENGTHS))
        logits = model(tokens()[None], positions[None], None, packed_seq_params=params)[0]
    else:
        with cpu_stand_ins.cpu_devices():
            parts = [
                model(
                    ids[None], torch.arange(len(ids))[None], torch.ones(len(ids), len(ids)).triu(1).bool()[None, None]
                )
                for ids in tokens().split(LENGTHS)
            ]
        logits = torch.cat(parts, dim=1)[0]
    logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    probe = torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(3))
    if torch.is_grad_enabled():
        (logits * probe).sum().backward()
    return logits.detach()


def gradients(model: GPTModel) -> dict[str, torch.Tensor]:
    """Complete gradients: those of norms over a rank's own rows or heads are summed, as finalize_model_grads does."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = parameter.grad.clone()
        if getattr(parameter, "sequence_parallel", False) or ("_layernorm." in name and "self_attention" in name):
            dist.all_reduce(found[name], group=parallel_state.get_tensor_model_parallel_group())
    return found


def compare(model: GPTModel, reference: GPTModel) -> float:
    """Return the largest relative error of a parameter's gradient."""
    ours, parameters = gradients(model), dict(model.named_parameters())
    errors = {}
    for name, parameter in reference.named_parameters():
        expected = cut(name, parameter.grad, parameters[te_name(name)])
        errors[name] = relative(ours[te_name(name)], expected)
    return max(errors.values())


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
