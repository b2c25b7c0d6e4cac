"""What a rank sends to others in a step, in bytes, by the group that it goes to. Pure.

Of a tensor of S bytes over n ranks, gathered or reduced and scattered, a rank sends S (n - 1) / n; reduced for all,
twice that; exchanged all to all, the same share of its own S.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_oprd.config import ParallelConfig
from megatron_oprd.types import ModelSpec


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends to its groups."""

    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    targets: float = 0.0  # rows of a teacher in another layout


def forward_traffic(spec: ModelSpec, layout: ParallelConfig, blocks: int, tokens: float, size: int) -> Traffic:
    """Of a forward pass over `tokens` of a replica (of all its context-parallel ranks) through `blocks` blocks, on an
    average pipeline rank; numbers of `size` bytes.

    tensor: two exchanges around attention, two around a dense MLP, each gathering or scattering all rows. context: keys
    and values of all rows. expert: a token's row to each of its experts, and back. pipeline: the rows at each boundary.
    """
    of_rank = blocks / layout.pipeline
    sparse = sum(layer < blocks for layer in spec.sparse_layers) / layout.pipeline
    rows = tokens / layout.context
    whole = rows * spec.hidden_size * size
    divided = whole / layout.tensor if layout.sequence else whole
    keys = 2 * tokens * spec.num_query_groups * spec.head_dim * size / layout.tensor
    boundaries = (layout.pipeline * (layout.virtual_pipeline or 1) - 1) / layout.pipeline
    return Traffic(
        tensor=(4 * of_rank - 2 * sparse + 1 / layout.pipeline) * whole * _share(layout.tensor),
        context=of_rank * keys * _share(layout.context),
        expert=2 * sparse * divided * spec.experts_per_token * _share(layout.expert),
        pipeline=boundaries * divided,
    )


def backward_traffic(spec: ModelSpec, layout: ParallelConfig, blocks: int, tokens: float, size: int) -> Traffic:
    """Of the backward pass: what forward did, the other way round. With sequence parallelism the inputs of the first
    products of attention and MLP are gathered once more, for their weights' gradients."""
    forward = forward_traffic(spec, layout, blocks, tokens, size)
    if not layout.sequence:
        return forward
    of_rank = blocks / layout.pipeline
    sparse = sum(layer < blocks for layer in spec.sparse_layers) / layout.pipeline
    whole = tokens / layout.context * spec.hidden_size * size
    again = (2 * of_rank - sparse) * whole * _share(layout.tensor)
    return dataclasses.replace(forward, tensor=forward.tensor + again)


def update_traffic(layout: ParallelConfig, dense: int, experts: int, world: int, size: int) -> Traffic:
    """Of fp32 gradients and of new parameters, over the ranks that hold the same ones: `dense` and `experts` trained
    parameters of a rank. With the distributed optimizer gradients are reduced and scattered, parameters gathered: by
    mcore's 0.16 twice where experts have an optimizer of their own, unless that overlaps the forward pass."""
    copies, of_experts = world // (layout.tensor * layout.pipeline), world // (layout.expert * layout.pipeline)
    gathers = 2 if experts and not layout.overlap_param_gather else 1
    a_parameter = 4 + gathers * size if layout.distributed_optimizer else 8
    return Traffic(data=a_parameter * (dense * _share(copies) + experts * _share(of_experts)))


def reach(layout: ParallelConfig, world: int) -> dict[str, int]:
    """Over how many consecutive ranks each kind of group stretches: tensor parallelism counts fastest, then context,
    data and pipeline parallelism; experts are spread over consecutive ranks."""
    return {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context,
        "expert": layout.expert,
        "pipeline": world,
        "data": world // layout.pipeline,
        "targets": world,
    }


def _share(ranks: int) -> float:
    return (ranks - 1) / ranks
