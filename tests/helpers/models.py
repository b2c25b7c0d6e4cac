"""Tiny random Hugging Face models, saved as a user would have them."""

import copy
from pathlib import Path

import torch
import transformers

from megatron_oprd.checkpoint.megatron_format import save_model
from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.platform import choose_device

# Sizes at the edges: one layer, seven heads that share one key and value, the head tied to the embedding.
TIED_ONE_LAYER_7_TO_1 = {
    "tie_word_embeddings": True,
    "num_hidden_layers": 1,
    "hidden_size": 56,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
}
# Sparse layers around a dense one.
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
# Waves of each kind: 6 positions, kept; 14, stretched in part; the longer ones, stretched.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}


def longrope(rotary_dim: int, original: int = 10, partial: float = 0.75, **rope) -> dict:
    """What a Phi3Config takes: LongRoPE beyond `original` positions, of so many dimensions of a head."""
    numbers = range(rotary_dim // 2)
    factors = {"short_factor": [1 + 0.1 * n for n in numbers], "long_factor": [1.3 + 0.5 * n for n in numbers]}
    return {
        "original_max_position_embeddings": original,
        "max_position_embeddings": 8 * original,
        "rope_parameters": {
            **{"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": partial},
            **factors,
            **rope,
        },
    }


# Each family beside what all have; random rollouts of the matrix of layouts are on both sides of Phi-3's 10 positions.
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Qwen3Moe": {"head_dim": 24, **EXPERTS},
    "Llama": {"head_dim": 24, "rope_parameters": LLAMA3_SCALING},
    "Phi3": {**longrope(6), "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}


def random_hf_model(family: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """A random model of one of FAMILIES in float32; biases and norms are random too, so that dropping one shows."""
    sizes = dict(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        initializer_range=0.1,
    )
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy({**sizes, **FAMILIES[family], **overrides}))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm" in name))
            elif name.endswith("mlp.gate.weight"):
                # Logits far apart: rounding must not choose a token's experts.
                parameter.copy_(torch.randn_like(parameter) * 0.5)
    return model


def save(model: torch.nn.Module, folder: Path, **kwargs) -> Path:
    model.save_pretrained(folder, **kwargs)
    return folder


def to_megatron(rank: int, folder: Path, target: Path, tensor: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint in `dtype`, as `tools/checkpoint_convert` does. Collective
    over the world."""
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(tensor=tensor), device, seed=0)
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, dtype)
    load_weights(stage, folder, spec, topology)
    save_model(stage, target, spec, topology, source=folder)
