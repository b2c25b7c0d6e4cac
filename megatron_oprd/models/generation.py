"""The forward pass of generation: the weights of the training model, with few kernels for each layer.

Decoding one token of each row takes as long as its kernels take to start. Megatron-Core's modules start more than twice
as many as needed, and some of their calls cannot be captured by a CUDA graph. Layers with experts still use
Megatron-Core's MoE module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.models.model import HiddenStateModel
from megatron_oprd.parallel.topology import Topology


@dataclass(frozen=True)
class GenerationPass:
    """The arguments of a forward pass over T tokens."""

    rotation: tuple[torch.Tensor, torch.Tensor]  # [T, 1, 1, rotary_dim]: cosines, and signed sines (`RotaryTable`)
    attention: Callable[[int, torch.Tensor, float], torch.Tensor]  # of `models/cached_attention.py`
    logit_rows: torch.Tensor | None = None  # [rows] int64: tokens for which the LM head is applied; None: all


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer on this rank. Matrices are transposed views: tokens are rows, multiplied from the left."""

    input_norm: torch.Tensor  # [hidden]
    qkv: torch.Tensor  # [hidden, groups * (heads / groups + 2) * d]
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [heads / groups + 1, d]: the weight for each query of a group, then for its key
    projection: torch.Tensor  # [heads * d, hidden]
    mlp_norm: torch.Tensor  # [hidden]
    fc1: torch.Tensor | None  # [hidden, 2 * ffn], the gate first; None: a layer with experts
    fc2: torch.Tensor | None  # [ffn, hidden]
    window: int  # the most tokens to which a token attends; 0: all before it
    experts: torch.nn.Module | None  # Megatron-Core's MoE module


class GenerationChunk:
    """Runs one chunk of the model in generation, with the weights of `chunk` in place.

    Communicates over: the tensor-parallel group, and in layers with experts the expert-parallel groups.
    """

    def __init__(self, chunk: HiddenStateModel, topology: Topology) -> None:
        self.config = chunk.config
        self.tensor_group = topology.groups.tp if topology.tensor_size > 1 else None
        self.groups = chunk.config.num_query_groups // topology.tensor_size
        self.scale = chunk.config.kv_channels**-0.5
        self.embedding = chunk.embedding.word_embeddings if chunk.pre_process else None
        self.layers = [_layer_weights(layer, chunk.config.add_qkv_bias) for layer in chunk.decoder.layers]
        self.last_stage = chunk.last_stage
        if self.last_stage:
            self.final_norm = chunk.decoder.final_layernorm.weight
            self.lm_head = chunk.lm_head.t()

    def __call__(self, inputs: torch.Tensor, batch: GenerationPass, first_layer: int = 0) -> torch.Tensor:
        """Run the chunk.

        Args:
            inputs: token ids [T] on the first stage, hidden states [T, hidden] on the others.
            first_layer: number of this rank's layers in lower chunks, which come first in the KV cache.

        Returns: logits [rows, vocabulary / tensor size] on the last stage, hidden states [T, hidden] on the others.
        """
        hidden = inputs if self.embedding is None else self._embed(inputs)
        for number, layer in enumerate(self.layers, start=first_layer):
            hidden = self._attend(number, layer, hidden, batch)
            hidden = self._feed_forward(layer, hidden)
        if not self.last_stage:
            return hidden
        if batch.logit_rows is not None:
            hidden = hidden.index_select(0, batch.logit_rows)
        return torch.mm(self._norm(hidden, self.final_norm), self.lm_head)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        weight = self.embedding.weight
        if self.tensor_group is None:
            return torch.nn.functional.embedding(tokens, weight)
        local = tokens - self.embedding.vocab_start_index
        elsewhere = (local < 0) | (local >= len(weight))
        hidden = torch.nn.functional.embedding(local.masked_fill_(elsewhere, 0), weight)
        hidden.masked_fill_(elsewhere[:, None], 0.0)
        dist.all_reduce(hidden, group=self.tensor_group)
        return hidden

    def _attend(self, number: int, layer: LayerWeights, hidden: torch.Tensor, batch: GenerationPass) -> torch.Tensor:
        projections = _multiply(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
        projections = projections.view(len(hidden), self.groups, -1, self.config.kv_channels)
        rotated = projections[:, :, :-1]
        if layer.qk_norm is not None:
            rotated.copy_(self._norm(rotated, layer.qk_norm))
        _rotate(rotated, *batch.rotation)
        return self._add(hidden, batch.attention(number, projections, self.scale), layer.projection)

    def _feed_forward(self, layer: LayerWeights, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._norm(hidden, layer.mlp_norm)
        if layer.fc1 is None or layer.fc2 is None:
            assert layer.experts is not None
            return hidden + layer.experts(normed[:, None])[0][:, 0]
        gate, up = torch.mm(normed, layer.fc1).chunk(2, dim=-1)
        return self._add(hidden, torch.nn.functional.silu(gate).mul_(up), layer.fc2)

    def _add(self, hidden: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return hidden [T, hidden] plus inputs [T, n / tensor size] times the weight of a row-parallel layer."""
        if self.tensor_group is None:
            return torch.addmm(hidden, inputs, weight)
        product = torch.mm(inputs, weight)
        dist.all_reduce(product, group=self.tensor_group)
        return product.add_(hidden)

    def _norm(self, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the RMSNorm of states [..., d] with weight [d], or a weight for each head [heads, d]."""
        epsilon = self.config.layernorm_epsilon
        if weight.dim() == 1:
            return torch.nn.functional.rms_norm(states, weight.shape, weight, epsilon)
        return torch.nn.functional.rms_norm(states, weight.shape[-1:], None, epsilon) * weight


def _layer_weights(layer: TransformerLayer, qkv_bias: bool) -> LayerWeights:
    attention, mlp = layer.self_attention, layer.mlp
    query_norm, key_norm = (getattr(norm, "weight", None) for norm in (attention.q_layernorm, attention.k_layernorm))
    qk_norm = None
    if query_norm is not None and key_norm is not None:
        per_group = attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
        qk_norm = torch.stack([*[query_norm] * per_group, key_norm])
    sparse = not hasattr(mlp, "linear_fc1")
    return LayerWeights(
        input_norm=_norm_weight(layer.input_layernorm, attention.linear_qkv),
        qkv=attention.linear_qkv.weight.t(),
        qkv_bias=attention.linear_qkv.bias if qkv_bias else None,
        qk_norm=qk_norm,
        projection=attention.linear_proj.weight.t(),
        mlp_norm=_norm_weight(layer.pre_mlp_layernorm, None if sparse else mlp.linear_fc1),
        fc1=None if sparse else mlp.linear_fc1.weight.t(),
        fc2=None if sparse else mlp.linear_fc2.weight.t(),
        window=attention.core_attention.window,
        experts=mlp if sparse else None,
    )


def _norm_weight(norm: torch.nn.Module, linear: torch.nn.Module | None) -> torch.Tensor:
    """Return the weight of a norm, which Transformer Engine keeps in the linear layer that follows."""
    fused = getattr(linear, "layer_norm_weight", None)
    weight: torch.Tensor = norm.weight if fused is None else fused
    return weight


def _multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first rotary_dim dimensions of states [T, groups, heads, d] in place.

    The two halves of these dimensions are paired, as in `models/rotary.py`. cos and sin are those of `RotaryTable`.
    """
    rotated = states[..., : cos.shape[-1]]
    swapped = rotated.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    rotated.mul_(cos).addcmul_(swapped, sin)
