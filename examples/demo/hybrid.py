"""Make hybrid models from models with attention alone: a Qwen3 becomes a Qwen3.5 with layers of Gated DeltaNet."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from examples.demo.make_pair import BATCH_SIZE, TEACHER_ACCURACY, TargetMissed, exact_match, train_step
from examples.demo.task import additions, encode, split_additions

STEPS, PEAK_RATE = 50, 5e-4  # of the teacher, after its layers were added
EVERY = 2  # a layer with Gated DeltaNet stands before every second layer of the Qwen3
START_SCALE = 0.02  # of the matrices with which a new layer adds to its input


def with_delta_net(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Return a Qwen3.5 that has the layers of a Qwen3 and, before every second of them, one with Gated DeltaNet.

    The copied layers compute what they computed: their output gates are 1/2, and their output matrices are doubled.
    The new layers are random and add little at first.
    """
    torch.manual_seed(seed)
    old, layers = model.config, model.config.num_hidden_layers
    kinds: list[str] = []
    for layer in range(layers):
        kinds += ["linear_attention"] * (layer % EVERY == 0) + ["full_attention"]
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    same += ("max_position_embeddings", "tie_word_embeddings", "initializer_range", "rms_norm_eps", "attention_dropout")
    same += ("bos_token_id", "eos_token_id", "pad_token_id")
    hybrid = Qwen3_5ForCausalLM(
        Qwen3_5TextConfig(
            **{name: getattr(old, name) for name in same},
            num_hidden_layers=len(kinds),
            layer_types=kinds,
            rope_parameters={**old.rope_parameters, "partial_rotary_factor": 1.0},
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=old.head_dim,
            linear_value_head_dim=old.head_dim,
            dtype="float32",
        )
    )
    hybrid.generation_config = model.generation_config
    copied = dict(enumerate(number for number, kind in enumerate(kinds) if kind == "full_attention"))
    with torch.no_grad():
        for number, kind in enumerate(kinds):
            if kind == "linear_attention":
                _start(hybrid.model.layers[number])
        hybrid.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
        hybrid.lm_head.weight.copy_(model.lm_head.weight)
        hybrid.model.norm.weight.copy_(model.model.norm.weight - 1)  # the norms of Qwen3.5 multiply by 1 + weight
        for source, target in copied.items():
            _copy(model.model.layers[source], hybrid.model.layers[target], old.num_attention_heads)
    return hybrid


def make_hybrid(pair: Path, seed: int) -> None:
    """Replace the models in the folder of a pair by hybrid models. The teacher is trained afterwards.

    Raises TargetMissed.
    """
    splits = split_additions(seed)
    for name in ("student", "teacher"):
        model = with_delta_net(AutoModelForCausalLM.from_pretrained(pair / name), seed)
        if name == "teacher":
            batches = (encode(additions(numbers)) for numbers in splits.supervised.split(BATCH_SIZE))
            train(model, batches, encode(splits.validation))
        model.save_pretrained(pair / name)
        print(f"hybrid {name}: {exact_match(model, encode(splits.heldout)):.1%} -> {pair / name}", flush=True)


def train(model: PreTrainedModel, batches: Iterator[torch.Tensor], validation: torch.Tensor) -> None:
    """Train all weights of a teacher for `STEPS` steps of a falling rate. Raises TargetMissed."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step in range(STEPS):
        train_step(model, optimizer, next(batches), PEAK_RATE * min(1.0, (step + 1) / 10) * (1 - step / STEPS))
    accuracy = exact_match(model, validation)
    if accuracy < TEACHER_ACCURACY - 0.01:
        raise TargetMissed(f"the hybrid teacher has an accuracy of {accuracy:.1%} after {STEPS} steps")


def _start(layer: torch.nn.Module) -> None:
    """Set the weights of a new layer that must not be those of transformers."""
    for matrix in (layer.linear_attn.out_proj, layer.mlp.down_proj):
        matrix.weight.mul_(START_SCALE)
    # softplus of this bias is 0.001 to 0.1, as in Mamba: the states then last many tokens.
    steps = torch.empty_like(layer.linear_attn.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
    layer.linear_attn.dt_bias.copy_(torch.expm1(steps).log())


def _copy(source: torch.nn.Module, target: torch.nn.Module, heads: int) -> None:
    """Copy a layer of a Qwen3 into a layer with attention of a Qwen3.5."""
    target.mlp.load_state_dict(source.mlp.state_dict())
    norms = [(source.self_attn.q_norm, target.self_attn.q_norm), (source.self_attn.k_norm, target.self_attn.k_norm)]
    norms += [
        (getattr(source, name), getattr(target, name)) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    for old, new in norms:
        new.weight.copy_(old.weight - 1)
    for name in ("k_proj", "v_proj"):
        getattr(target.self_attn, name).weight.copy_(getattr(source.self_attn, name).weight)
    query = source.self_attn.q_proj.weight.unflatten(0, (heads, -1))
    # Each head has the rows of its query, then those of its gate: sigmoid(0) is 1/2.
    target.self_attn.q_proj.weight.copy_(torch.cat((query, torch.zeros_like(query)), dim=1).flatten(0, 1))
    target.self_attn.o_proj.weight.copy_(2 * source.self_attn.o_proj.weight)
