"""The names under which a stock GPTModel of Megatron-Core asks a checkpoint for what this package stores otherwise.

Norms before attention and before the MLP have the names of Transformer Engine's fused modules, with the local layer
spec too. Each linear layer and norm has an `_extra_state`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_oprd.checkpoint.megatron_lm import renamed, stored_names
from megatron_oprd.parallel.topology import Topology

# Modules with `_extra_state` in Megatron-Core: FP8 scales of Transformer Engine, or nothing.
_WITHOUT_EXTRA_STATE = ("embedding.", "output_layer.", "router.")


def fused_name(name: str) -> str | None:
    """Return the name of a norm in the linear layer after it, or None for other parameters.

    The linear layer after the first norm is that of softmax attention: no stock model has our linear attention.
    """
    _, *fused = stored_names(name)
    return fused[0] if fused else None


def fused_norms(tensors: Iterable[ShardedTensor]) -> Iterator[ShardedTensor]:
    """Yield the norms among `tensors` a second time, under their names in fused modules."""
    for tensor in tensors:
        fused = fused_name(tensor.key)
        if fused is not None:
            yield renamed(tensor, fused)


def extra_states(tensors: Iterable[ShardedTensor], topology: Topology) -> Iterator[ShardedObject]:
    """Yield the empty extra state of each module. Megatron-Core asks for them when it loads a checkpoint.

    Each rank has one for its modules; equal ones of several ranks are written once.
    """
    for tensor in tensors:
        module, _, parameter = tensor.key.rpartition(".")
        if parameter != "weight" or any(part in tensor.key for part in _WITHOUT_EXTRA_STATE):
            continue
        axes = tensor.prepend_axis_num
        tensor_rank = 0 if ".experts." in module else topology.tensor_rank
        yield ShardedObject(
            f"{module}._extra_state",
            None,
            tuple(tensor.global_shape[:axes]) or (1,),
            tuple(tensor.global_offset[:axes]) or (0,),
            (0, tensor_rank, tensor.replica_id[-1]),
        )
