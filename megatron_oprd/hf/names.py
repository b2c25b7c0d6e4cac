"""Tables that map the Hugging Face tensors of each model family to Megatron-Core parameters."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from megatron_oprd.model_spec import DeltaNet, ModelSpec

Layout = Literal["copy", "rows", "columns", "vocabulary", "qkv", "gate_up", "delta"]


@dataclass(frozen=True)
class Entry:
    """A Megatron parameter, its Hugging Face tensors, and how tensor parallelism shards it.

    Layouts:
        copy: every rank has the full parameter.
        rows, columns: sharded along dimension 0 or 1.
        vocabulary: rows, padded with zeros to a multiple of the tensor-parallel size.
        qkv: query, key and value interleaved by query group, sharded between groups. With an output gate, the gates of
            a group follow its queries; Hugging Face has the gate of a head after its query.
        gate_up: each of the two halves is sharded separately, and every rank concatenates its two shards.
        delta: rows of Gated DeltaNet, ordered by key head as `models/delta_net.py` says, sharded between key heads.
    For qkv and gate_up, Hugging Face has either separate tensors or one tensor with the parts concatenated. For delta,
    it has tensors in the same order (Qwen3-Next), or separate tensors with or without concatenated parts (Qwen3.5).
    """

    megatron: str  # parameter name
    hf: tuple[str, ...]  # tensor names
    layout: Layout
    expert: int | None = None  # number of the expert; each rank has complete experts, which are never sharded

    @property
    def cut(self) -> bool:
        """True if each tensor-parallel rank has a different shard; otherwise a rank has the full parameter."""
        return self.layout != "copy" and self.expert is None

    def inside(self, layer: int, expert: int | None = None) -> Entry:
        """Return this entry of a layer table with the names of block `layer` and, for experts, of `expert`."""
        return Entry(
            f"decoder.layers.{layer}.{self.megatron.format(expert=expert)}",
            tuple(f"model.layers.{layer}.{name.format(expert=expert)}" for name in self.hf),
            self.layout,
            expert,
        )


_BLOCK = (
    Entry("input_layernorm.weight", ("input_layernorm.weight",), "copy"),
    Entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Entry("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "copy"),
)
_QKV = (Entry("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"),)
_FUSED_QKV = (Entry("self_attention.linear_qkv.weight", ("self_attn.qkv_proj.weight",), "qkv"),)
_QKV_BIAS = (Entry("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv"),)
_QK_NORM = (
    Entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "copy"),
    Entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "copy"),
)
QWEN3_5 = tuple(
    f"Qwen3_5{experts}For{kind}" for experts in ("", "Moe") for kind in ("CausalLM", "ConditionalGeneration")
)
QWEN3_NEXT = "Qwen3NextForCausalLM"
BLOCK_TABLES = {
    "Qwen2ForCausalLM": (*_BLOCK, *_QKV, *_QKV_BIAS),
    "Qwen3ForCausalLM": (*_BLOCK, *_QKV, *_QK_NORM),
    "Qwen3MoeForCausalLM": (*_BLOCK, *_QKV, *_QK_NORM),
    "Qwen2MoeForCausalLM": (*_BLOCK, *_QKV, *_QKV_BIAS),
    "LlamaForCausalLM": (*_BLOCK, *_QKV),
    "MistralForCausalLM": (*_BLOCK, *_QKV),
    "Phi3ForCausalLM": (*_BLOCK, *_FUSED_QKV),
    **dict.fromkeys((*QWEN3_5, QWEN3_NEXT), (*_BLOCK, *_QKV, *_QK_NORM)),
}
_DELTA_NET = (
    _BLOCK[0],
    Entry("self_attention.conv_weight", ("linear_attn.conv1d.weight",), "delta"),
    Entry("self_attention.A_log", ("linear_attn.A_log",), "rows"),
    Entry("self_attention.dt_bias", ("linear_attn.dt_bias",), "rows"),
    Entry("self_attention.norm_weight", ("linear_attn.norm.weight",), "copy"),
    Entry("self_attention.out_proj.weight", ("linear_attn.out_proj.weight",), "columns"),
    _BLOCK[2],
)
_DELTA_INPUTS = tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
_ORDERED_DELTA_INPUTS = tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkvz", "ba"))
# The tables of blocks with Gated DeltaNet in place of attention.
DELTA_NET_TABLES = {
    **dict.fromkeys(QWEN3_5, (*_DELTA_NET, Entry("self_attention.in_proj.weight", _DELTA_INPUTS, "delta"))),
    QWEN3_NEXT: (*_DELTA_NET, Entry("self_attention.in_proj.weight", _ORDERED_DELTA_INPUTS, "delta")),
}
_DOWN = Entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "columns")
_MLP = (Entry("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"), _DOWN)
_FUSED_MLP = (Entry("mlp.linear_fc1.weight", ("mlp.gate_up_proj.weight",), "gate_up"), _DOWN)
DENSE_MLP_TABLES = {**dict.fromkeys(BLOCK_TABLES, _MLP), "Phi3ForCausalLM": _FUSED_MLP}
ROUTER = Entry("mlp.router.weight", ("mlp.gate.weight",), "copy")
EXPERT = (
    Entry(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
        "gate_up",
    ),
    Entry(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        ("mlp.experts.{expert}.down_proj.weight",),
        "columns",
    ),
)
# The expert that processes every token, and its gate.
SHARED_EXPERT = (
    Entry("mlp.shared_experts.gate_weight", ("mlp.shared_expert_gate.weight",), "copy"),
    Entry(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
        "gate_up",
    ),
    Entry("mlp.shared_experts.linear_fc2.weight", ("mlp.shared_expert.down_proj.weight",), "columns"),
)
EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")
# Names in Transformer Engine's fused modules, and the names of the same norms in our own layer spec.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.in_proj.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "copy")
LM_HEAD = Entry("output_layer.weight", ("lm_head.weight",), "vocabulary")


def own_name(name: str) -> str:
    """Return the name in our own layer spec of a parameter in a Transformer Engine model; other names are unchanged."""
    for fused, own in FUSED_NORMS.items():
        name = name.replace(fused, own)
    return _GROUPED_EXPERT.sub(r"mlp.experts.local_experts.\2.\1.weight", name)


def entries(spec: ModelSpec) -> tuple[Entry, ...]:
    """Return the table of the full model, without the LM head if the embeddings are tied.

    Layers are counted from 0 over all pipeline stages, experts from 0 over all expert-parallel ranks.
    """
    layers = tuple(entry for layer in range(spec.num_layers) for entry in _layer_entries(spec, layer))
    return (EMBEDDING, *layers, FINAL_NORM, *(() if spec.tied_embeddings else (LM_HEAD,)))


def _layer_entries(spec: ModelSpec, layer: int) -> tuple[Entry, ...]:
    tables = DELTA_NET_TABLES if layer in spec.linear_layers else BLOCK_TABLES
    block = tuple(entry.inside(layer) for entry in tables[spec.architecture])
    if layer not in spec.sparse_layers:
        return (*block, *(entry.inside(layer) for entry in DENSE_MLP_TABLES[spec.architecture]))
    experts = (entry.inside(layer, expert) for expert in range(spec.num_experts) for entry in EXPERT)
    shared = (entry.inside(layer) for entry in SHARED_EXPERT) if spec.shared_ffn_hidden_size else ()
    return (*block, ROUTER.inside(layer), *shared, *experts)


def hf_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a Hugging Face checkpoint of this model, by name."""
    dense, expert, shared = (
        _shapes_by_suffix(spec, ffn)
        for ffn in (spec.ffn_hidden_size, spec.moe_ffn_hidden_size, spec.shared_ffn_hidden_size)
    )
    shapes = {}
    for entry in entries(spec):
        for name in entry.hf:
            table = shared if ".shared_expert." in name else dense if entry.expert is None else expert
            shapes[name] = next(shape for suffix, shape in table.items() if name.endswith(suffix))
    return shapes


def _shapes_by_suffix(spec: ModelSpec, ffn: int) -> dict[str, tuple[int, ...]]:
    hidden = spec.hidden_size
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    return {
        **(_delta_net_shapes(spec.delta_net, hidden) if spec.delta_net else {}),
        "embed_tokens.weight": (spec.vocab_size, hidden),
        "lm_head.weight": (spec.vocab_size, hidden),
        # Fused names come first, because the names of their parts are suffixes of them.
        "qkv_proj.weight": (queries + 2 * keys, hidden),
        "gate_up_proj.weight": (2 * ffn, hidden),
        "q_proj.weight": (2 * queries if spec.output_gate else queries, hidden),
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
        "mlp.gate.weight": (spec.num_experts, hidden),
        "mlp.shared_expert_gate.weight": (1, hidden),
        "layernorm.weight": (hidden,),
        "model.norm.weight": (hidden,),
    }


def _delta_net_shapes(sizes: DeltaNet, hidden: int) -> dict[str, tuple[int, ...]]:
    heads, values = sizes.num_value_heads, sizes.num_value_heads * sizes.value_dim
    channels = sizes.num_key_heads * sizes.convolved
    return {
        "linear_attn.conv1d.weight": (channels, 1, sizes.kernel),
        "linear_attn.A_log": (heads,),
        "linear_attn.dt_bias": (heads,),
        "linear_attn.norm.weight": (sizes.value_dim,),
        "linear_attn.out_proj.weight": (hidden, values),
        "linear_attn.in_proj_qkv.weight": (channels, hidden),
        "linear_attn.in_proj_qkvz.weight": (channels + values, hidden),
        "linear_attn.in_proj_ba.weight": (2 * heads, hidden),
        "linear_attn.in_proj_z.weight": (values, hidden),
        "linear_attn.in_proj_b.weight": (heads, hidden),
        "linear_attn.in_proj_a.weight": (heads, hidden),
    }


def padded_vocab_size(spec: ModelSpec, tensor_size: int) -> int:
    """Return the vocabulary size in Megatron: the next multiple of the tensor-parallel size."""
    return -(-spec.vocab_size // tensor_size) * tensor_size


def megatron_shapes(spec: ModelSpec, tensor_size: int = 1) -> dict[str, tuple[int, ...]]:
    """Return the shape of every full Megatron parameter by name. The vocabulary is padded for `tensor_size` ranks."""
    shapes, result = hf_shapes(spec), {}
    for entry in entries(spec):
        rows = sum(shapes[name][0] for name in entry.hf)
        if entry.layout == "vocabulary":
            rows = padded_vocab_size(spec, tensor_size)
        result[entry.megatron] = (rows, *shapes[entry.hf[0]][1:])
    return result


def count_parameters(spec: ModelSpec) -> int:
    """Return the parameters of the complete model, without vocabulary padding."""
    return sum(math.prod(shape) for shape in megatron_shapes(spec).values())


def shard_shape(entry: Entry, full: tuple[int, ...], tensor_size: int) -> tuple[int, ...]:
    """Return the shape of one rank's shard of an entry of shape `full`, with `tensor_size` ranks."""
    if not entry.cut:
        return full
    if entry.layout == "columns":
        return (full[0], full[1] // tensor_size)
    return (full[0] // tensor_size, *full[1:])
