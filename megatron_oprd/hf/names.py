"""One declarative table per family: which Hugging Face tensors make which Megatron-Core parameter, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_oprd.types import ModelSpec

Layout = Literal["copy", "rows", "columns", "vocabulary", "qkv", "gate_up"]


@dataclass(frozen=True)
class Entry:
    """A Megatron parameter, the Hugging Face tensors it is made of, and how tensor parallelism divides it.

    copy: held whole by every rank. rows, columns: cut along dimension 0 or 1. vocabulary: rows, padded with zeros to
    a multiple of the ranks. qkv: query, key and value interleaved by query group, cut between groups. gate_up: the
    two halves are cut each for itself and laid one after the other on every rank.
    """

    megatron: str
    hf: tuple[str, ...]
    layout: Layout


_LAYER = (
    Entry("input_layernorm.weight", ("input_layernorm.weight",), "copy"),
    Entry("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Entry("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "copy"),
    Entry("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    Entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "columns"),
)
LAYER_TABLES = {
    "Qwen2ForCausalLM": (
        *_LAYER,
        Entry("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv"),
    ),
    "Qwen3ForCausalLM": (
        *_LAYER,
        Entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "copy"),
        Entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "copy"),
    ),
}
EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "copy")
LM_HEAD = Entry("output_layer.weight", ("lm_head.weight",), "vocabulary")


def entries(spec: ModelSpec) -> tuple[Entry, ...]:
    """The table of a whole model, layers numbered from 0 over all pipeline stages; no LM head when it is tied."""
    layers = tuple(
        Entry(
            f"decoder.layers.{layer}.{entry.megatron}",
            tuple(f"model.layers.{layer}.{name}" for name in entry.hf),
            entry.layout,
        )
        for layer in range(spec.num_layers)
        for entry in LAYER_TABLES[spec.architecture]
    )
    return (EMBEDDING, *layers, FINAL_NORM, *(() if spec.tied_embeddings else (LM_HEAD,)))


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor that a Hugging Face checkpoint of this model must hold, with its shape."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    by_suffix: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (spec.vocab_size, hidden),
        "lm_head.weight": (spec.vocab_size, hidden),
        "q_proj.weight": (queries, hidden),
        "k_proj.weight": (keys, hidden),
        "v_proj.weight": (keys, hidden),
        "o_proj.weight": (hidden, queries),
        "q_proj.bias": (queries,),
        "k_proj.bias": (keys,),
        "v_proj.bias": (keys,),
        "q_norm.weight": (spec.head_dim,),
        "k_norm.weight": (spec.head_dim,),
        "gate_proj.weight": (ffn, hidden),
        "up_proj.weight": (ffn, hidden),
        "down_proj.weight": (hidden, ffn),
        "layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
    }
    names = [name for entry in entries(spec) for name in entry.hf]
    return {name: next(shape for suffix, shape in by_suffix.items() if name.endswith(suffix)) for name in names}


def padded_vocab_size(spec: ModelSpec, tensor_size: int) -> int:
    """The vocabulary as Megatron holds it: a multiple of the tensor-parallel size."""
    return -(-spec.vocab_size // tensor_size) * tensor_size


def megatron_shapes(spec: ModelSpec, tensor_size: int = 1) -> dict[str, tuple[int, ...]]:
    """Every whole Megatron parameter with its shape, the vocabulary padded to a multiple of `tensor_size` rows."""
    shapes, result = hf_shapes(spec), {}
    for entry in entries(spec):
        rows = sum(shapes[name][0] for name in entry.hf)
        if entry.layout == "vocabulary":
            rows = padded_vocab_size(spec, tensor_size)
        result[entry.megatron] = (rows, *shapes[entry.hf[0]][1:])
    return result


def shard_shape(entry: Entry, whole: tuple[int, ...], tensor_size: int) -> tuple[int, ...]:
    """The shape of what each of `tensor_size` ranks holds of an entry of shape `whole`."""
    if entry.layout == "copy":
        return whole
    if entry.layout == "columns":
        return (whole[0], whole[1] // tensor_size)
    return (whole[0] // tensor_size, *whole[1:])
