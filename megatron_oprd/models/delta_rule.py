"""The gated delta rule and the causal convolution before it, for packed sequences, in plain torch.

The state of a value head is a matrix S [key_dim, value_dim] that starts at zero in every sequence. Token t changes it
to

    S = exp(g_t) S + k_t (beta_t (v_t - exp(g_t) S^T k_t))^T        and has the output        o_t = S^T q_t,

where g_t <= 0 is the decay. Sequences are divided into chunks. Inside a chunk all tokens are computed at once (Yang et
al., arXiv 2412.06464, section 3.3); from chunk to chunk only the state is passed on.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

CHUNK = 64  # tokens; the chunks of transformers, so that sums have the same order


@dataclass(frozen=True)
class ChunkPlan:
    """The chunks of some packed sequences, in the order in which the states need them.

    Step i computes chunk i of every sequence that has one. Longer sequences come first, so the sequences of a step are
    the first ones of the step before.
    """

    steps: tuple[int, ...]  # sequences of each step
    order: torch.Tensor  # [sequences] int64: the sequences, most chunks first
    places: torch.Tensor  # [tokens] int64: the place of each token in the chunks
    after_zeros: torch.Tensor  # [tokens] int64: the sequence of each token, counted from 1


def plan_chunks(bounds: Sequence[int], device: torch.device) -> ChunkPlan:
    """Plan the chunks of sequences with the cumulative lengths `bounds`."""
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    chunks = [-(-length // CHUNK) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda sequence: -chunks[sequence])
    steps = [sum(count > step for count in chunks) for step in range(max(chunks, default=0))]
    first_slots = torch.tensor([0, *itertools.accumulate(steps)])
    ranks = {sequence: rank for rank, sequence in enumerate(order)}
    places = []
    for sequence, length in enumerate(lengths):
        tokens = torch.arange(length)
        places.append((first_slots[tokens // CHUNK] + ranks[sequence]) * CHUNK + tokens % CHUNK)
    repeats = torch.tensor(lengths, dtype=torch.int64)
    numbers = torch.arange(1, len(lengths) + 1).repeat_interleave(repeats, output_size=sum(lengths))
    return ChunkPlan(
        tuple(steps),
        torch.tensor(order, dtype=torch.int64, device=device),
        torch.cat([torch.empty(0, dtype=torch.int64), *places]).to(device),
        numbers.to(device),
    )


def causal_convolution(inputs: torch.Tensor, weight: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """Return the convolution of each channel with its last tokens, [tokens, channels].

    No token of another sequence enters: zeros stand before each sequence.

    Args:
        inputs: [tokens, channels].
        weight: [channels, 1, kernel], the token itself last.
    """
    tokens, channels = inputs.shape
    zeros = weight.shape[-1] - 1
    places = torch.arange(tokens, device=inputs.device) + zeros * plan.after_zeros
    padded = inputs.new_zeros(tokens + zeros * len(plan.order), channels).index_copy(0, places, inputs)
    outputs = torch.nn.functional.conv1d(padded.t()[None], weight, groups=channels)[0].t()
    return outputs.index_select(0, places - zeros)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    plan: ChunkPlan,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the outputs [tokens, value heads, value_dim] and the states after the last token of each sequence.

    The states are [sequences, value heads, key_dim, value_dim]. All is computed in float32 at least; the outputs have
    the dtype of `value`. Queries and keys are normalised to length 1, then queries divided by sqrt(key_dim).

    Args:
        query, key: [tokens, key heads, key_dim]. A key head serves consecutive value heads.
        value: [tokens, value heads, value_dim].
        decay: g [tokens, value heads], not above 0.
        beta: [tokens, value heads].
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    per_key = value.shape[1] // key.shape[1]
    query, key = (_unit(x.to(dtype)).repeat_interleave(per_key, dim=1) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    beta = beta.to(dtype)[..., None]
    query, key, key_beta, value_beta, decays = (
        _in_chunks(x, plan) for x in (query, key, key * beta, value.to(dtype) * beta, decay.to(dtype)[..., None])
    )

    sums = decays[..., 0].cumsum(dim=-1)  # log of the decay since the start of the chunk
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).triu(1)
    between = (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()
    since_start = sums.exp()[..., None]
    # The updates of a chunk depend on each other: a triangular system gives them all.
    system = (key_beta @ key.transpose(-1, -2)) * between
    updates, from_state = torch.linalg.solve_triangular(
        system, torch.cat((value_beta, key_beta * since_start), dim=-1), upper=False, unitriangular=True
    ).split((value.shape[-1], key.shape[-1]), dim=-1)
    inside = (query @ key.transpose(-1, -2)) * between
    query = query * since_start
    key = key * (sums[..., -1:] - sums).exp()[..., None]
    remaining = sums[..., -1].exp()[..., None, None]

    state = query.new_zeros(plan.steps[0], value.shape[1], key.shape[-1], value.shape[-1])
    outputs, states = pass_states((updates, from_state, query, key, inside, remaining), state, plan.steps)
    return _by_token(outputs, plan).to(value.dtype), torch.empty_like(states).index_copy(0, plan.order, states)


def pass_states(
    chunks: tuple[torch.Tensor, ...], state: torch.Tensor, steps: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pass the states of all sequences from chunk to chunk.

    Args:
        chunks: Six tensors [chunks, heads, ...]: the updates that a chunk makes if the state before it is zero, the
            factors [CHUNK, key_dim] by which that state changes the updates, queries, keys, the weights
            [CHUNK, CHUNK] of earlier updates in each output, and the decay of the state over the chunk.
        state: The states before the first chunks, [sequences, heads, key_dim, value_dim].
        steps: The sequences of each step.

    Returns:
        The outputs [chunks, heads, CHUNK, value_dim] and the states after the last chunk of each sequence.
    """
    outputs, states = [], []
    # The gradient of a split is one concatenation; that of a slice would be a tensor of all chunks in every step.
    for update, from_state, query, key, inside, remaining in zip(*(x.split(steps) for x in chunks), strict=True):
        ended, state = state[len(update) :], state[: len(update)]
        states.append(ended)
        new = update - from_state @ state
        outputs.append(query @ state + inside @ new)
        state = state * remaining + key.transpose(-1, -2) @ new
    return torch.cat(outputs), torch.cat([state, *reversed(states)])


def delta_rule_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> torch.Tensor:
    """Change the states [rows, value heads, key_dim, value_dim] in place by one token of each row.

    Arguments as for `gated_delta_rule`, with rows in place of tokens. Returns the outputs [rows, value heads,
    value_dim].
    """
    per_key = value.shape[1] // key.shape[1]
    query, key = (_unit(x.to(state.dtype)).repeat_interleave(per_key, dim=1)[..., None, :] for x in (query, key))
    state.mul_(decay.to(state.dtype).exp()[..., None, None])
    known = key @ state
    new = (value.to(state.dtype)[..., None, :] - known) * beta.to(state.dtype)[..., None, None]
    state.addcmul_(key.transpose(-1, -2), new)
    return ((query * query.shape[-1] ** -0.5) @ state).squeeze(-2).to(value.dtype)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def _in_chunks(x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    """Return [tokens, heads, d] as [chunks, heads, CHUNK, d], with zeros after the last token of a sequence."""
    padded = x.new_zeros(sum(plan.steps) * CHUNK, *x.shape[1:]).index_copy(0, plan.places, x)
    return padded.unflatten(0, (-1, CHUNK)).transpose(1, 2)


def _by_token(x: torch.Tensor, plan: ChunkPlan) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1).index_select(0, plan.places)
