"""Recompute parts of a block in backward instead of storing them in the forward pass.

Values and gradients have the bits that they have without recomputation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_oprd.config import RecomputeConfig
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.delta_net import GatedDeltaNet
from megatron_oprd.models.norm import RMSNorm
from megatron_oprd.types import UserError


@dataclass(frozen=True)
class Recomputation:
    """The recomputation of one pipeline rank."""

    parts: frozenset[str] = frozenset()  # recomputed in every block that is not recomputed completely
    blocks: int = 0  # first blocks of each chunk that are recomputed completely


def recomputation_of(config: RecomputeConfig, pipeline_rank: int) -> Recomputation | None:
    """Return the recomputation of a pipeline rank, or None if Megatron-Core's own arguments describe it."""
    if config.stages is not None:
        stage = config.stages[pipeline_rank]
        return Recomputation(frozenset(stage.parts), stage.blocks)
    if not config.parts:
        return None
    return Recomputation(frozenset(config.parts), config.num_layers if config.granularity == "full" else 0)


def available_parts(spec: ModelSpec, *, transformer_engine: bool, fp8: bool) -> tuple[str, ...]:
    """Return the parts of a block that can be recomputed alone.

    Transformer Engine has norms inside of linear layers. A layer that computes in FP8 stores its input in FP8, so that
    nothing would be saved.
    """
    if fp8:
        return ("core_attn",)
    norms = () if transformer_engine else ("layernorm",)
    dense = () if len(spec.sparse_layers) == spec.num_layers else ("activation",)
    return (*norms, *dense, "mlp", "core_attn")


def check_parts(config: RecomputeConfig, available: Collection[str]) -> None:
    """Raise UserError if a part that the configuration names cannot be recomputed alone."""
    named = {*(config.parts or ()), *(part for stage in config.stages or () for part in stage.parts)}
    for part in sorted(named.difference(available)):
        works = f"one of {', '.join(available)}" if available else "recompute.granularity=full"
        raise UserError(
            f"recompute: the part {part} cannot be recomputed alone with this model and precision; use {works}"
        )


def set_recomputation(chunks: Iterable[Any], recomputation: Recomputation) -> None:
    """Set what the chunks of a model recompute. It may change between two updates."""
    blocks = recomputation.blocks
    for chunk in chunks:
        config = chunk.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = (
            ("full", "block", blocks) if blocks else (None, None, None)
        )
        for number, layer in enumerate(chunk.decoder.layers):
            set_parts(layer, frozenset() if number < blocks else recomputation.parts)


def set_parts(layer: Any, parts: frozenset[str]) -> None:
    """Set the parts of one block that are recomputed alone."""
    layer.recomputed_parts = parts
    if isinstance(layer.self_attention, Attention | GatedDeltaNet):
        layer.self_attention.checkpoint_core_attention = "core_attn" in parts
    if isinstance(layer.mlp, MoELayer):
        layer.mlp.moe_layer_recompute = "mlp" in parts


@dataclass(frozen=True)
class Computed:
    """A tensor of the forward pass, and the way to compute it again."""

    tensor: torch.Tensor
    again: Callable[[], torch.Tensor]

    def storing_nothing(self) -> Any:
        """Return a context in which operations store `again` wherever they would store the tensor or a view of it."""
        return _stored_as(self.tensor, self.again)


def run_norm(norm: torch.nn.Module, hidden_states: torch.Tensor, parts: Collection[str]) -> Computed:
    """Run a norm. If `parts` has `layernorm`, only the norm's input is stored; otherwise its output is stored too."""
    if "layernorm" not in parts or not isinstance(norm, RMSNorm):
        output = norm(hidden_states)
        stored_output = output.detach()
        return Computed(output, lambda: stored_output)
    stored = hidden_states.detach()
    normalized = norm.normalize(hidden_states)
    with _stored_as(normalized, lambda: norm.normalize(stored)):
        output = norm.scale(normalized)
    return Computed(output, lambda: norm(stored))


def run_mlp(mlp: torch.nn.Module, normed: Computed, parts: Collection[str]) -> Any:
    """Run a dense MLP, or a layer of experts, on the output of a norm.

    A dense MLP stores the input of its activation if `parts` has `activation`, and nothing if `parts` has `mlp`: then
    backward repeats the first matrix product. Communicates like the MLP, in backward too.
    """
    with normed.storing_nothing():
        if not isinstance(mlp, MLP) or not {"activation", "mlp"} & set(parts):
            return mlp(normed.tensor)
        gate_up = mlp.linear_fc1(normed.tensor)[0]
    product = _Again(mlp.linear_fc1, normed.again) if "mlp" in parts else _Stored(gate_up.detach())
    with _stored_as(gate_up, product.take):
        activated = _activate(mlp, gate_up)
    del gate_up
    with _stored_as(activated, lambda: _activate(mlp, product.look())):
        return mlp.linear_fc2(activated)


def _activate(mlp: MLP, gate_up: torch.Tensor) -> torch.Tensor:
    """Return what Megatron-Core's MLP computes between its two products."""
    own = mlp.config.use_te_activation_func
    activated: torch.Tensor = mlp.activation_func(gate_up) if own else bias_swiglu_impl(gate_up, None, False, False)
    return activated


class _Stored:
    """The output of the first product, which is stored."""

    def __init__(self, gate_up: torch.Tensor) -> None:
        self._gate_up = gate_up

    def look(self) -> torch.Tensor:
        return self._gate_up

    take = look


class _Again:
    """The output of the first product, computed once for the two places of backward that use it."""

    def __init__(self, product: torch.nn.Module, compute_input: Callable[[], torch.Tensor]) -> None:
        self._product, self._compute_input = product, compute_input
        self._result: torch.Tensor | None = None

    def look(self) -> torch.Tensor:
        if self._result is None:
            self._result = self._product(self._compute_input())[0]
        return self._result

    def take(self) -> torch.Tensor:
        result, self._result = self.look(), None
        return result


@dataclass(frozen=True)
class _Recipe:
    """The way to compute a tensor again, in place of the tensor."""

    compute: Callable[[], torch.Tensor]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def _stored_as(tensor: torch.Tensor, compute: Callable[[], torch.Tensor]) -> Any:
    """Let operations inside the block store `compute` wherever they would store `tensor` or a view of it."""
    storage = tensor.untyped_storage()._cdata  # `tensor` outlives the block, so no other storage has this address

    def pack(saved: torch.Tensor) -> torch.Tensor | _Recipe:
        if saved.untyped_storage()._cdata != storage:
            return saved
        return _Recipe(compute, tuple(saved.size()), saved.stride(), int(saved.storage_offset()))

    def unpack(stored: torch.Tensor | _Recipe) -> torch.Tensor:
        if isinstance(stored, torch.Tensor):
            return stored
        with torch.no_grad():
            return stored.compute().as_strided(stored.size, stored.stride, stored.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
