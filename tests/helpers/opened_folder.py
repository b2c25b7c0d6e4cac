"""Compare a Hugging Face folder, as the product opens it, with the model that transformers loads from it."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from megatron_oprd.hf.reader import HFReader
from megatron_oprd.model_spec import DeltaNet, LongRope, ModelSpec
from megatron_oprd.models.rotary import Rotary

HEAD = "lm_head.weight"


def assert_as_transformers(folder: Path, spec: ModelSpec, reader: HFReader) -> None:
    """Assert that transformers opens the folder, and that its model has this specification and these tensors."""
    model = load(folder, reader.dtype())
    assert model is not None
    assert_same_spec(spec, model)
    expected = single_experts(model.state_dict())
    assert expected.keys() - ({HEAD} if spec.tied_embeddings else set()) <= set(reader.names()) <= expected.keys()
    for tensor in reader.names():
        own = reader.read(tensor).to(reader.dtype())
        assert torch.allclose(own, expected[tensor], rtol=0, atol=0, equal_nan=True), tensor


def single_experts(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a model with one tensor for each expert."""
    single = {}
    for name, tensor in state.items():
        layer, _, projection = name.partition(".experts.")
        if not projection:
            single[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            parts = {"gate": 0, "up": 1} if projection == "gate_up_proj" else {"down": 0}
            for part, number in parts.items():
                single[f"{layer}.experts.{expert}.{part}_proj.weight"] = matrix.chunk(len(parts))[number]
    return single


def assert_same_spec(spec: ModelSpec, model: torch.nn.Module) -> None:
    """Compare a specification with the modules that transformers built."""
    config, layers, rotary = model.config, model.model.layers, model.model.rotary_emb
    assert spec.num_layers == len(layers)
    assert (spec.vocab_size, spec.hidden_size) == model.model.embed_tokens.weight.shape
    assert (spec.num_attention_heads, spec.num_query_groups) == (config.num_attention_heads, config.num_key_value_heads)
    attention = [layer.self_attn for layer in layers if hasattr(layer, "self_attn")]
    assert {one.head_dim for one in attention} <= {spec.head_dim}
    assert_same_delta_net(spec, layers)
    dense = {len(layer.mlp.up_proj.weight) for layer in layers if hasattr(layer.mlp, "up_proj")}
    dense |= {len(layer.mlp.gate_up_proj.weight) // 2 for layer in layers if hasattr(layer.mlp, "gate_up_proj")}
    assert dense <= {spec.ffn_hidden_size}
    norms = [module for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert {spec.norm_epsilon} == {getattr(norm, "variance_epsilon", None) or norm.eps for norm in norms}
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert spec.tied_embeddings is (model.lm_head.weight is model.model.embed_tokens.weight)
    assert spec.eos_token_ids == end_tokens(model)
    own = Rotary(spec)
    assert torch.equal(own.inverse_frequencies[0], rotary.inv_freq)
    assert own.factor == rotary.attention_scaling
    if isinstance(spec.rope_scaling, LongRope):
        assert own.long_above == config.original_max_position_embeddings
        assert list(spec.rope_scaling.long_factor) == config.rope_parameters["long_factor"]
    sparse = {number: layer.mlp for number, layer in enumerate(layers) if hasattr(layer.mlp, "experts")}
    assert spec.sparse_layers == tuple(sparse)
    for mlp in sparse.values():
        assert (spec.num_experts, 2 * spec.moe_ffn_hidden_size) == mlp.experts.gate_up_proj.shape[:2]
        shared = getattr(mlp, "shared_expert", None)
        assert spec.shared_ffn_hidden_size == (0 if shared is None else len(shared.up_proj.weight))
        normalises = getattr(mlp.gate, "norm_topk_prob", True)  # Qwen3.5-MoE always does
        assert (spec.experts_per_token, spec.norm_topk_prob) == (mlp.gate.top_k, normalises)


def assert_same_delta_net(spec: ModelSpec, layers: torch.nn.ModuleList) -> None:
    """Compare the Gated DeltaNet layers of a specification with the modules that transformers built."""
    linear = {number: layer.linear_attn for number, layer in enumerate(layers) if hasattr(layer, "linear_attn")}
    assert spec.linear_layers == tuple(linear)
    for module in linear.values():
        assert spec.delta_net == DeltaNet(
            module.num_k_heads, module.num_v_heads, module.head_k_dim, module.head_v_dim, module.conv_kernel_size
        )


def load(folder: Path, dtype: torch.dtype | str) -> torch.nn.Module | None:
    """Return the model that transformers loads, or None if a tensor is missing, unknown or of another shape."""
    try:
        model, differences = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    except RuntimeError:
        return None
    return None if any(differences.values()) else model


def end_tokens(model: torch.nn.Module) -> tuple[int, ...]:
    """Return the ids at which `generate` stops, then those of the config."""
    both = (model.generation_config.eos_token_id, model.config.eos_token_id)
    ids = [token for ends in both for token in (ends if isinstance(ends, list) else [] if ends is None else [ends])]
    return tuple(dict.fromkeys(ids))
