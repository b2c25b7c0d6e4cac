"""Tiny random Hugging Face models, saved as a user would have them."""

from pathlib import Path

import torch
import transformers

from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.models.megatron_checkpoint import save_model
from megatron_oprd.models.weights import load_weights
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.platform import choose_device

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


def random_hf_model(family: str, seed: int = 0, **overrides) -> torch.nn.Module:
    """A random Qwen2, Qwen3 or Qwen3Moe in float32; biases and norms are random too, so that dropping one shows."""
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
        **({} if family == "Qwen2" else {"head_dim": 24}),
        **(EXPERTS if family == "Qwen3Moe" else {}),
    )
    config = getattr(transformers, f"{family}Config")(**{**sizes, **overrides})
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


def to_megatron(rank: int, folder: Path, target: Path, tensor: int = 1) -> None:
    """Write a Hugging Face folder of float32 as a Megatron checkpoint, as `tools/checkpoint_convert` does. Collective
    over the world."""
    device = choose_device("auto")
    start_process(device)
    topology = build_topology(ParallelConfig(tensor=tensor), device, seed=0)
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, torch.float32)
    load_weights(stage, folder, spec, topology)
    save_model(stage, target, spec, topology, source=folder)
