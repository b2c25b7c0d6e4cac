"""What a Hugging Face config says, without one: a tiny dense Qwen3, with anything else given by name."""

from typing import Any

from megatron_oprd.types import ModelSpec

TINY: dict[str, Any] = {
    "architecture": "Qwen3ForCausalLM",
    "num_layers": 8,
    "hidden_size": 64,
    "ffn_hidden_size": 112,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "head_dim": 24,
    "vocab_size": 131,
    "norm_epsilon": 1e-6,
    "rope_theta": 1e6,
    "rotary_dim": 24,
    "max_position_embeddings": 128,
    "tied_embeddings": False,
    "qkv_bias": False,
    "qk_norm": True,
}


def tiny_spec(**fields: Any) -> ModelSpec:
    return ModelSpec(**{**TINY, **fields})
