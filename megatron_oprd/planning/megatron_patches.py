"""Everything that is replaced while an update is traced, and why.

A traced process is one rank of many, the other ranks do not exist, and its tensors have shapes but no values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import clip_grads
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.nn.attention import bias as attention_bias

from megatron_oprd.models import delta_rule
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.planning import balanced_experts, repeated_calls
from megatron_oprd.planning.memory_trace import LiveBytes

_new_group = dist.new_group


@dataclass(frozen=True)
class Patch:
    """An attribute and its replacement."""

    owner: Any  # a module or a class
    name: str
    replacement: Any
    reason: str


@contextlib.contextmanager
def patched(patches: Sequence[Patch]) -> Iterator[None]:
    """Set the attributes of `patches` inside the block and restore them at its end."""
    with contextlib.ExitStack() as restore:
        for patch in patches:
            restore.callback(setattr, patch.owner, patch.name, vars(patch.owner)[patch.name])
            setattr(patch.owner, patch.name, patch.replacement)
        yield


def tracing_patches(live: LiveBytes) -> list[Patch]:
    """Return all patches. `live` counts the bytes of the trace."""
    return [
        Patch(dist, "new_group", _new_fake_group, "Megatron-Core names the gloo backend, which would wait for ranks"),
        Patch(dist, "all_gather_object", _repeat_own_object, "the other ranks do not exist"),
        Patch(torch.nn.Module, "to", _stay, "a parameter without memory cannot be moved"),
        Patch(clip_grads, "l2_norm_impl", _l2_norm, "the original looks at values"),
        Patch(P2PCommunicator, "_communicate_shapes", _own_shapes, "the other pipeline ranks do not exist"),
        Patch(attention_bias, "causal_lower_right", _no_mask, "a GPU kernel needs no mask tensor"),
        Patch(MoEAlltoAllTokenDispatcher, "preprocess", balanced_experts.preprocess, "a router without values"),
        Patch(token_dispatcher, "permute", balanced_experts.permute_with(live), "a routing map without values"),
        Patch(token_dispatcher, "sort_chunks_by_idxs", balanced_experts.sort_chunks, "indices without values"),
        Patch(delta_rule, "pass_states", _pass_states, "a loop over chunks is thousands of calls"),
        Patch(TransformerLayer, "forward", repeated_calls.layer_forward_with(live), "equal layers are traced once"),
        Patch(OutputLoss, "_chunk", repeated_calls.chunk_loss_with(live), "equal chunks are traced once"),
        Patch(SequentialMLP, "__init__", balanced_experts.init_experts, "one module for all experts of a rank"),
        Patch(SequentialMLP, "forward", balanced_experts.forward_experts, "one module for all experts of a rank"),
    ]


def announce_rows(stage: Stage, rows: int) -> None:
    """Store in the model's configuration how many rows its pipeline stages send each other."""
    stage.config.rows_sent = rows


def _own_shapes(communicator: P2PCommunicator, *args: Any) -> tuple[list[int], list[int]]:
    """Return the shapes that the previous and the next pipeline rank would announce: those of this rank."""
    config: Any = communicator.config
    shape = [config.rows_sent, 1, config.hidden_size]
    return shape, shape


def _new_fake_group(*args: Any, **kwargs: Any) -> Any:
    return _new_group(*args, **{**kwargs, "backend": None})


def _repeat_own_object(objects: list[Any], own: Any, *args: Any, **kwargs: Any) -> None:
    objects[:] = [own] * len(objects)


def _stay(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    return module


def _no_mask(*lengths: int) -> None:
    return None


def _pass_states(
    chunks: tuple[torch.Tensor, ...], state: torch.Tensor, steps: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Have the memory of `delta_rule.pass_states`, which stores a state and the new values of each chunk."""
    update, from_state, query, key, inside, _ = chunks
    states = key.transpose(-1, -2) @ update
    new = update - from_state @ states
    return (query @ states).add_(inside @ new), states[: steps[0]]


def _l2_norm(
    chunk_size: int, overflow: torch.Tensor, tensors: list[list[torch.Tensor]], *args: Any
) -> tuple[torch.Tensor, None]:
    """Return the L2 norm of many tensors, as Megatron-Core computes it without fused kernels."""
    return torch.stack([torch.norm(tensor) for one in tensors for tensor in one]).norm(), None
