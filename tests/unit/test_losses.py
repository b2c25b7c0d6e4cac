"""Packed, weighted sums equal the definition of the loss for every division of the batch over ranks."""

import itertools

import pytest
import torch

from megatron_oprd.config import OutputConfig, RepresentationConfig
from megatron_oprd.data.balance import assign
from megatron_oprd.data.context_parallel_slices import Slice, cut, zigzag_rows
from megatron_oprd.data.packing import Padding, Terms, num_tokens, output_term, pack, representation_term
from megatron_oprd.losses.positions import select_positions
from megatron_oprd.losses.reduction import layer_sums, layer_weights
from megatron_oprd.losses.representation import token_statistics, weighted_gradient
from megatron_oprd.testing.reference import oprd_loss, token_error
from megatron_oprd.types import Rollout


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_gradient_equals_autograd(normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(9, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(9, generator=generator, dtype=torch.float64)
    leaf = student.clone().requires_grad_()
    expected = sum(w * token_error(s, t, normalize) for w, s, t in zip(weights, leaf, teacher, strict=True))
    expected.backward()
    value = layer_sums(token_statistics(student, teacher, normalize), weights)[0]
    gradient = weighted_gradient(student, teacher, normalize, weights)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_states_give_exactly_zero(normalize, dtype):
    states = torch.randn(5, 33).to(dtype)
    statistics = token_statistics(states, states.clone(), normalize)
    gradient = weighted_gradient(states, states.clone(), normalize, torch.rand(5))
    assert not statistics.error.any()
    assert gradient.dtype == dtype and not gradient.any()
    assert torch.all(statistics.cosine > 0.999)


def test_a_zero_state_gives_finite_results():
    zeros, ones = torch.zeros(2, 4), torch.ones(2, 4)
    assert token_statistics(zeros, ones, "l2").error.isfinite().all()
    assert weighted_gradient(zeros, ones, "l2", torch.ones(2)).isfinite().all()


@pytest.mark.parametrize(
    ("mask", "mode", "k", "expected"),
    [
        ([1, 1, 0, 0, 1, 1], "last_k", 3, [1, 4, 5]),
        ([1, 1, 0, 0, 1, 1], "first_k", 3, [0, 1, 4]),
        ([1, 1, 0], "last", 9, [1]),
        ([1, 0, 1], "all", 1, [0, 2]),
        ([1, 1], "last_k", 9, [0, 1]),
        ([], "last", 1, []),
        ([0, 0], "last_k", 1, []),
    ],
)
def test_positions_count_sampled_tokens_only(mask, mode, k, expected):
    assert select_positions(mask, mode, k) == expected


def make_rollouts():
    """Uneven lengths, one empty response, one with unsampled tokens in between."""
    masks = [(1,) * 7, (), (1,), (1, 1, 0, 0, 1, 1, 1), (1, 1, 1)]
    return [Rollout((100 + i,) * (2 + i), (5,) * len(m), m, "replay") for i, m in enumerate(masks)]


CASES = itertools.product(
    ["all", "last", "last_k", "first_k"],
    ["sequence_mean", "token_mean"],
    ["none", "l2"],
    [0, -1],
    # Data ranks, context ranks, sequence ranks, tokens a micro-batch.
    [(1, 1, 1, 12), (2, 1, 1, 100), (3, 1, 2, 13), (1, 2, 1, 12), (2, 3, 2, 100)],
)


@pytest.mark.parametrize(("positions", "aggregation", "normalize", "shift", "layout"), CASES)
def test_packed_sums_equal_the_definition(positions, aggregation, normalize, shift, layout):
    config = RepresentationConfig(
        positions=positions, k=3, aggregation=aggregation, normalize=normalize, shift=shift, layers=[1, 2]
    )
    rollouts = make_rollouts()
    generator = torch.Generator().manual_seed(0)
    states, sequences = {}, []
    for rollout in rollouts:
        student, teacher = (
            {layer: torch.randn(num_tokens(rollout), 6, generator=generator, dtype=torch.float64) for layer in (1, 2)}
            for _ in range(2)
        )
        states[rollout.prompt_ids[0]] = (student, teacher)
        sequences.append((student, teacher, len(rollout.prompt_ids), rollout.response_mask))
    expected = oprd_loss([(1, 1), (2, 2)], sequences, config)
    total, rows = 0.0, []
    for full_batch, batch, place in every_rank(rollouts, config, *layout):
        selection = batch.representation
        rows += selection.token_numbers.tolist()
        for layer in (1, 2):
            student, teacher = (full_states(full_batch, states, side, layer)[place] for side in (0, 1))
            statistics = token_statistics(student[selection.selected], teacher[selection.selected], normalize)
            total += layer_sums(statistics, layer_weights(selection.weights, num_layers=2))[0].item()
    assert total == pytest.approx(expected.item(), rel=1e-12)
    assert sorted(rows) == list(range(len(rows))), "each selected token is compared once and has a number of its own"


def every_rank(rollouts, config, data, context, sequence, limit):
    """Yield (full micro-batch, part of a rank, its rows of the full micro-batch) for every rank of a layout."""
    term, output = representation_term(config, rollouts), output_term(OutputConfig(), rollouts)
    assert term.counts.sequences == 4 and output.counts.tokens == 0
    useful = [i for i, chosen in enumerate(term.positions) if chosen]
    lengths = [num_tokens(rollouts[i]) for i in useful]
    multiple = 2 * context if context > 1 else 1
    for members in itertools.chain(*assign(lengths, lengths, data, limit)):
        full_batch = pack(
            [rollouts[useful[i]] for i in members],
            [useful[i] for i in members],
            Terms(term, output),
            [0] * len(members),
            Padding(multiple, multiple * sequence),
        )
        for c, s in itertools.product(range(context), range(sequence)):
            place = torch.arange(full_batch.num_tokens)
            if context > 1:
                place = zigzag_rows(full_batch.bounds, c, context)
            part = cut(full_batch, Slice(c, context, s, sequence))
            torch.testing.assert_close(part.tokens, full_batch.tokens[place])
            yield full_batch, part, place.chunk(sequence)[s]


def full_states(full_batch, states, side, layer):
    """Return the states of every row of a micro-batch. Padding repeats the start of the first sequence."""
    bounds = full_batch.bounds
    result = torch.zeros(bounds[-1], 6).double()
    first_tokens = {}
    for sequence, (start, end) in enumerate(itertools.pairwise(bounds)):
        for token in full_batch.tokens[start:end].tolist():
            if token >= 100:
                first_tokens[sequence] = token  # a prompt's tokens are all alike
    for sequence, token in first_tokens.items():
        rows = states[token][side][layer][: bounds[sequence + 1] - bounds[sequence]]
        result[bounds[sequence] : bounds[sequence] + len(rows)] = rows
    return result


def test_a_batch_of_padding_selects_nothing():
    terms = representation_term(RepresentationConfig(), []), output_term(OutputConfig(), [])
    batch = pack([], [], Terms(*terms), [], Padding(batch_multiple=4))
    assert batch.num_tokens == 4 and len(batch.representation) == len(batch.output) == 0
    assert batch.bounds == (0, 4)


def test_lengths_are_those_without_padding_on_every_context_parallel_rank():
    rollouts = [Rollout((9,) * 3, (1,) * n, (1,) * n, "replay") for n in (2, 6)]
    terms = representation_term(RepresentationConfig(), rollouts), output_term(OutputConfig(), rollouts)
    full_batch = pack(rollouts, [0, 1], Terms(*terms), [0, 0], Padding(4, 8))
    assert full_batch.lengths.tolist() == [5] * 8 + [9] * 12 + [4] * 4
    assert [cut(full_batch, Slice(rank, 2)).lengths.tolist() for rank in (0, 1)] == [[5] * 4 + [9] * 6 + [4] * 2] * 2
