"""Tiny random Hugging Face models of every supported family."""

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

# Extreme sizes: one layer, seven heads that share one key-value head, an LM head tied to the embedding.
TIED_ONE_LAYER_7_TO_1 = {
    "tie_word_embeddings": True,
    "num_hidden_layers": 1,
    "hidden_size": 56,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
}
# A mixture of experts in every layer but layer 1.
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [1],
}
# Rotary wavelengths below 24 / 3 positions are kept, those above 24 scaled, those between interpolated. A tiny head has
# all three kinds.
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 3.0,
    "original_max_position_embeddings": 24,
}


# YaRN that keeps one of the four frequencies of a head, interpolates one and stretches two.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 8.0,
    "beta_slow": 0.1,
}
HYBRID = ("Qwen3_5", "Qwen3_5Moe", "Qwen3Next")


def longrope(rotary_dim: int, original: int = 10, partial: float = 0.75, **rope) -> dict:
    """Return the arguments of a Phi3Config with LongRoPE.

    Args:
        rotary_dim: dimensions of a head that are rotated.
        original: positions up to which the short factors apply.
        partial: rotated part of a head.
        rope: further keys of `rope_parameters`.
    """
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


SHARED_AND_OTHER_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 48,
}
# Gated DeltaNet in layers 1, 3 and 5: two key heads with two value heads each. The weights are small, because the
# gradient of a decay is a small difference of large sums, in which rounding errors of float32 would show.
DELTA_NET = {
    "initializer_range": 0.03,
    "head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "full_attention_interval": 2,
}
# Settings of each family. Phi-3 changes its rotary factors after 10 positions, which most tests have on both sides.
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {"head_dim": 24},
    "Qwen3Moe": {"head_dim": 24, **EXPERTS},
    "Qwen2Moe": {
        **EXPERTS,
        "norm_topk_prob": False,
        "shared_expert_intermediate_size": 48,
        "rope_parameters": YARN,
    },
    "Llama": {"head_dim": 24, "rope_parameters": LLAMA3_SCALING},
    "Qwen3_5": DELTA_NET,
    "Qwen3_5Moe": {**DELTA_NET, **SHARED_AND_OTHER_EXPERTS},
    "Qwen3Next": {**DELTA_NET, **EXPERTS, **SHARED_AND_OTHER_EXPERTS},
    "Mistral": {"head_dim": 24, "sliding_window": 6},
    "Phi3": {**longrope(6), "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}


def random_hf_model(family: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """Return a random model of one of FAMILIES in float32.

    Biases and norms are random too: a test must notice if one of them is lost. `overrides` are keys of its config.
    """
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
    config_class = f"{family}TextConfig" if family.startswith("Qwen3_5") else f"{family}Config"
    config = getattr(transformers, config_class)(**copy.deepcopy({**sizes, **FAMILIES[family], **overrides}))
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + _center(name, family))
            elif name.endswith("mlp.gate.weight"):
                # Router logits lie far apart, so that rounding does not change the experts of a token.
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif name.endswith("conv1d.weight"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def _center(name: str, family: str) -> float:
    """Return the mean of the random values of a bias or norm."""
    if name.endswith("A_log"):
        return -2.0  # the states of Gated DeltaNet then last some ten tokens
    zero_centered = family in HYBRID and "linear_attn" not in name
    return float("norm" in name and not zero_centered)


def save(model: torch.nn.Module, folder: Path, **kwargs) -> Path:
    """Save a model in Hugging Face format and return the folder."""
    model.save_pretrained(folder, **kwargs)
    return folder


def to_megatron(rank: int, folder: Path, target: Path, tensor: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Write a Hugging Face folder as a Megatron checkpoint in `dtype`, as tools/checkpoint_convert does.

    Collective over the world.
    """
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(tensor=tensor), device, seed=0)
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, dtype)
    load_weights(stage, folder, spec, topology)
    save_model(stage, target, spec, topology, source=folder)
