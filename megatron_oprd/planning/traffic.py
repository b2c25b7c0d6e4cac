"""Bytes that one rank sends in a training step, by process group. All functions are pure.

For a tensor of S bytes over n ranks, a rank sends

    all-gather or reduce-scatter   S (n - 1) / n
    all-reduce                     2 S (n - 1) / n
    all-to-all                     S (n - 1) / n, where S are the rank's own bytes
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_oprd.config import ParallelConfig
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.planning.delta_net_costs import gathered_bytes, linear_layers_below


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends, by process group."""

    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    targets: float = 0.0  # the teachers' hidden states, from point to point


def forward_traffic(
    spec: ModelSpec, layout: ParallelConfig, layers: int, tokens: float, bytes_per_number: int
) -> Traffic:
    """Return the bytes that an average pipeline rank sends in a forward pass.

    - tensor: two exchanges around attention and two around a dense MLP or a shared expert. Each gathers or scatters
      all rows.
    - context: keys and values of all rows; with Gated DeltaNet the inputs of its convolution, decay and beta.
    - expert: the row of a token to each of its experts, and back.
    - pipeline: the rows at each boundary between stages.

    Args:
        spec: The model.
        layout: The sizes of its process groups.
        layers: The number of layers that are computed, from the lowest.
        tokens: The tokens of one replica, over all its context-parallel ranks.
        bytes_per_number: Bytes of one number of the hidden states.
    """
    layers_per_rank = layers / layout.pipeline
    sparse = sum(layer < layers for layer in spec.sparse_layers) / layout.pipeline
    divided_mlps = layers_per_rank - (0 if spec.shared_ffn_hidden_size else sparse)
    all_rows = tokens / layout.context * spec.hidden_size * bytes_per_number
    own_rows = all_rows / layout.tensor if layout.sequence else all_rows
    linear = linear_layers_below(spec, layers) / layout.pipeline
    keys_and_values = 2 * spec.num_query_groups * spec.head_dim * bytes_per_number
    gathered = (layers_per_rank - linear) * keys_and_values
    if spec.delta_net is not None:
        gathered += linear * gathered_bytes(spec.delta_net, bytes_per_number)
    boundaries = (layout.pipeline * (layout.virtual_pipeline or 1) - 1) / layout.pipeline
    return Traffic(
        tensor=(2 * layers_per_rank + 2 * divided_mlps + 1 / layout.pipeline) * all_rows * _sent_share(layout.tensor),
        context=tokens * gathered / layout.tensor * _sent_share(layout.context),
        expert=2 * sparse * own_rows * spec.experts_per_token * _sent_share(layout.expert),
        pipeline=boundaries * own_rows,
    )


def backward_traffic(
    spec: ModelSpec, layout: ParallelConfig, layers: int, tokens: float, bytes_per_number: int
) -> Traffic:
    """Return the bytes that an average pipeline rank sends in a backward pass.

    Every exchange of the forward pass has a counterpart of the same size. With sequence parallelism, the inputs of the
    first products of attention and MLP are gathered once more for the gradients of their weights. The arguments are
    those of `forward_traffic`.
    """
    forward = forward_traffic(spec, layout, layers, tokens, bytes_per_number)
    if not layout.sequence:
        return forward
    layers_per_rank = layers / layout.pipeline
    sparse = sum(layer < layers for layer in spec.sparse_layers) / layout.pipeline
    divided_mlps = layers_per_rank - (0 if spec.shared_ffn_hidden_size else sparse)
    all_rows = tokens / layout.context * spec.hidden_size * bytes_per_number
    gathered_again = (layers_per_rank + divided_mlps) * all_rows * _sent_share(layout.tensor)
    return dataclasses.replace(forward, tensor=forward.tensor + gathered_again)


def update_traffic(
    layout: ParallelConfig, parameters: tuple[int, int], world_size: int, bytes_per_number: int
) -> Traffic:
    """Return the bytes that a rank sends to reduce fp32 gradients and to distribute new parameters.

    With the distributed optimizer, gradients are reduce-scattered and parameters gathered. Megatron-Core 0.16 gathers
    twice if experts have an optimizer of their own, unless the gather overlaps the forward pass.

    Args:
        layout: The student's layout.
        parameters: The trained parameters of one rank, (dense, experts).
        world_size: The number of ranks.
        bytes_per_number: Bytes of one parameter of the model.
    """
    dense, experts = parameters
    dense_copies = world_size // (layout.tensor * layout.pipeline)
    expert_copies = world_size // (layout.expert * layout.pipeline)
    gathers = 2 if experts and not layout.overlap_param_gather else 1
    bytes_per_parameter = 4 + gathers * bytes_per_number if layout.distributed_optimizer else 8
    sent = dense * _sent_share(dense_copies) + experts * _sent_share(expert_copies)
    return Traffic(data=bytes_per_parameter * sent)


def group_spans(layout: ParallelConfig, world_size: int) -> dict[str, int]:
    """Return the number of consecutive ranks that a process group of each kind spans.

    Ranks count tensor parallelism fastest, then context, data and pipeline parallelism. Experts are divided over
    consecutive ranks.
    """
    return {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context,
        "expert": layout.expert,
        "pipeline": world_size,
        "data": world_size // layout.pipeline,
        "targets": world_size,
    }


def _sent_share(ranks: int) -> float:
    return (ranks - 1) / ranks
