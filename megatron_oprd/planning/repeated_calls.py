"""Trace equal calls once: layers of a forward pass without gradients, and chunks of an output-space objective.

A teacher has dozens of equal layers, an objective has dozens of equal chunks of tokens, and `recompute: auto` traces
both again for each recomputation that it tries. `LiveBytes.repeat` repeats the memory of an equal call.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.losses.lm_head import HeadInput
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.planning.memory_trace import LiveBytes

_layer_forward = TransformerLayer.forward
_chunk_loss = OutputLoss._chunk


def layer_forward_with(live: LiveBytes) -> Callable[..., Any]:
    """Return a replacement for `TransformerLayer.forward` that repeats the memory of an equal layer.

    Layers are equal if they have the same modules, parameters of the same shapes, and inputs of the same sizes. Other
    layers run: with gradients, because backward needs their graph, and with experts, because Megatron-Core's token
    dispatcher keeps tensors until its next call.
    """
    structures: dict[TransformerLayer, Hashable] = {}  # also keeps a layer, so that the id of its config stays unique

    def forward(layer: TransformerLayer, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = kwargs.get("packed_seq_params")
        with_experts = hasattr(layer.mlp, "token_dispatcher")
        if torch.is_grad_enabled() or with_experts or args or not isinstance(batch, MicroBatch):
            return _layer_forward(layer, hidden_states, *args, **kwargs)
        if layer not in structures:
            structures[layer] = _structure(layer)
        key = (structures[layer], layer.training, _sizes(hidden_states), _state(batch))
        context: list[Any] = []

        def run() -> tuple[torch.Tensor, ...]:
            output, other = _layer_forward(layer, hidden_states, **kwargs)
            context.append(other)
            return (output,)

        (output,) = live.repeat(key, run)
        return output, next(iter(context), None)

    return forward


def chunk_loss_with(live: LiveBytes) -> Callable[..., Any]:
    """Return a replacement for `OutputLoss._chunk` that repeats the memory of a chunk of the same sizes."""

    def chunk_loss(
        loss: OutputLoss, student: torch.Tensor, teacher: HeadInput, token_ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        key = (id(loss), _sizes(student), _head_sizes(teacher))
        return live.repeat(key, lambda: _chunk_loss(loss, student, teacher, token_ids, weights))

    return chunk_loss


def _structure(layer: TransformerLayer) -> Hashable:
    parameters = tuple((name, _sizes(parameter)) for name, parameter in layer.named_parameters())
    return id(layer.config), tuple(type(module) for module in layer.modules()), parameters


def _state(batch: MicroBatch) -> Hashable:
    """Return the lengths of the sequences, and the fields that a layer has set, which later layers do not set again."""
    fields = (getattr(batch, field.name) is None for field in dataclasses.fields(batch))
    return batch.bounds, batch.context and batch.context.size, tuple(fields)


def _head_sizes(model: HeadInput | None) -> Hashable:
    return model and (_sizes(model.states), _sizes(model.head), _head_sizes(model.base))


def _sizes(tensor: torch.Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype
