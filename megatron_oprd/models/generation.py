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
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.models.delta_net import GatedDeltaNet
from megatron_oprd.models.model import HiddenStateModel
from megatron_oprd.parallel.topology import Topology


@dataclass(frozen=True)
class GenerationPass:
    """The arguments of a forward pass over T tokens."""

    rotation: tuple[torch.Tensor, torch.Tensor]  # [T, 1, 1, rotary_dim]: cosines, and signed sines (`RotaryTable`)
    attention: Callable[[int, torch.Tensor, float], torch.Tensor]  # of `models/cached_attention.py`
    # Of `models/recurrent_cache.py`; None: no layer has Gated DeltaNet.
    delta_net: Callable[[int, GatedDeltaNet, torch.Tensor], torch.Tensor] | None = None
    logit_rows: torch.Tensor | None = None  # [rows] int64: tokens for which the LM head is applied; None: all


@dataclass(frozen=True)
class LayerWeights:
    """The weights of a layer on this rank. Matrices are transposed views: tokens are rows, multiplied from the left.

    Norms that multiply by 1 + weight have that sum in float32.
    """

    input_norm: torch.Tensor  # [hidden]
    # [hidden, groups * (heads / groups + 2) * d], with an output gate 2 * heads / groups + 2; the input projection of
    # Gated DeltaNet.
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None  # [heads / groups + 1, d]: the weight for each query of a group, then for its key
    projection: torch.Tensor  # [heads * d, hidden]
    mlp_norm: torch.Tensor  # [hidden]
    fc1: torch.Tensor | None  # [hidden, 2 * ffn], the gate first; None: a layer with experts
    fc2: torch.Tensor | None  # [ffn, hidden]
    window: int  # the most tokens to which a token attends; 0: all before it
    delta_net: GatedDeltaNet | None  # None: a layer with attention
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
        # By the number of the layer in the model.
        self.layers = dict(enumerate(map(_layer_weights, chunk.decoder.layers), start=chunk.first_layer))
        self.last_stage = chunk.last_stage
        if self.last_stage:
            self.final_norm = _norm_weight(chunk.decoder.final_layernorm, None, chunk.config)
            self.lm_head = chunk.lm_head.t()

    def __call__(self, inputs: torch.Tensor, batch: GenerationPass) -> torch.Tensor:
        """Run the chunk.

        Args:
            inputs: token ids [T] on the first stage, hidden states [T, hidden] on the others.

        Returns: logits [rows, vocabulary / tensor size] on the last stage, hidden states [T, hidden] on the others.
        """
        hidden = inputs if self.embedding is None else self._embed(inputs)
        for number, layer in self.layers.items():
            hidden = self._mix_tokens(number, layer, hidden, batch)
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

    def _mix_tokens(
        self, number: int, layer: LayerWeights, hidden: torch.Tensor, batch: GenerationPass
    ) -> torch.Tensor:
        """Add the output of attention, or of Gated DeltaNet."""
        projections = _multiply(self._norm(hidden, layer.input_norm), layer.qkv, layer.qkv_bias)
        if layer.delta_net is None:
            mixed = self._attend(number, layer, projections, batch)
        else:
            assert batch.delta_net is not None
            mixed = batch.delta_net(number, layer.delta_net, projections)
        return self._add(hidden, mixed, layer.projection)

    def _attend(
        self, number: int, layer: LayerWeights, projections: torch.Tensor, batch: GenerationPass
    ) -> torch.Tensor:
        projections, gate = projections.view(len(projections), self.groups, -1, self.config.kv_channels), None
        if self.config.attention_output_gate:
            queries = projections.shape[2] // 2 - 1
            query, gate, key_value = projections.split((queries, queries, 2), dim=2)
            projections = torch.cat((query, key_value), dim=2)
        rotated = projections[:, :, :-1]
        if layer.qk_norm is not None:
            rotated.copy_(self._norm(rotated, layer.qk_norm))
        _rotate(rotated, *batch.rotation)
        output = batch.attention(number, projections, self.scale)
        return output if gate is None else output * torch.sigmoid(gate.reshape(output.shape))

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
        if weight.dtype != states.dtype:
            return self._norm(states.to(weight.dtype), weight).to(states.dtype)
        if weight.dim() == 1:
            return torch.nn.functional.rms_norm(states, weight.shape, weight, epsilon)
        return torch.nn.functional.rms_norm(states, weight.shape[-1:], None, epsilon) * weight


def _layer_weights(layer: TransformerLayer) -> LayerWeights:
    mixer, mlp, config = layer.self_attention, layer.mlp, layer.config
    delta_net = mixer if isinstance(mixer, GatedDeltaNet) else None
    inputs, outputs = (mixer.linear_qkv, mixer.linear_proj) if delta_net is None else (mixer.in_proj, mixer.out_proj)
    sparse = not hasattr(mlp, "linear_fc1")
    return LayerWeights(
        input_norm=_norm_weight(layer.input_layernorm, inputs, config),
        qkv=inputs.weight.t(),
        qkv_bias=inputs.bias if config.add_qkv_bias and delta_net is None else None,
        qk_norm=_qk_norm(mixer, config) if delta_net is None else None,
        projection=outputs.weight.t(),
        mlp_norm=_norm_weight(layer.pre_mlp_layernorm, None if sparse else mlp.linear_fc1, config),
        fc1=None if sparse else mlp.linear_fc1.weight.t(),
        fc2=None if sparse else mlp.linear_fc2.weight.t(),
        window=mixer.core_attention.window if delta_net is None else 0,
        delta_net=delta_net,
        experts=mlp if sparse else None,
    )


def _qk_norm(attention: SelfAttention, config: TransformerConfig) -> torch.Tensor | None:
    """Return the weight of the norm of each query of a group and of its key."""
    if getattr(attention.q_layernorm, "weight", None) is None:
        return None
    query, key = (_norm_weight(norm, None, config) for norm in (attention.q_layernorm, attention.k_layernorm))
    per_group = attention.num_attention_heads_per_partition // attention.num_query_groups_per_partition
    return torch.stack([*[query] * per_group, key])


def _norm_weight(norm: torch.nn.Module, linear: torch.nn.Module | None, config: TransformerConfig) -> torch.Tensor:
    """Return the weight of a norm, which Transformer Engine keeps in the linear layer that follows."""
    fused = getattr(linear, "layer_norm_weight", None)
    weight: torch.Tensor = norm.weight if fused is None else fused
    return weight.float() + 1 if config.layernorm_zero_centered_gamma else weight


def _multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(inputs, weight) if bias is None else torch.addmm(bias, inputs, weight)


def _rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate the first rotary_dim dimensions of states [T, groups, heads, d] in place.

    The two halves of these dimensions are paired, as in `models/rotary.py`. cos and sin are those of `RotaryTable`.
    """
    rotated = states[..., : cos.shape[-1]]
    swapped = rotated.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    rotated.mul_(cos).addcmul_(swapped, sin)
