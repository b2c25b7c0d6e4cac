"""Packed, weighted sums equal the method's definition, however the batch is cut."""

import itertools

import pytest
import torch

from megatron_oprd.config import RepresentationConfig
from megatron_oprd.data.packing import empty_batch, pack, selected_per_rollout
from megatron_oprd.losses.positions import select_positions
from megatron_oprd.losses.reduction import count, layer_sums, layer_weights
from megatron_oprd.losses.representation import token_statistics, weighted_gradient
from megatron_oprd.types import Rollout, UserError
from tests.helpers.reference import oprd_loss, token_error


@pytest.mark.parametrize("normalize", ["none", "l2"])
@pytest.mark.parametrize("seed", range(3))
def test_the_closed_form_gradient_is_autograds(normalize, seed):
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


def test_a_zero_state_gives_finite_numbers():
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
    ["all", "last", "last_k", "first_k"], ["sequence_mean", "token_mean"], ["none", "l2"], [0, -1], [12, 13, 100]
)


@pytest.mark.parametrize(("positions", "aggregation", "normalize", "shift", "limit"), CASES)
def test_packed_sums_equal_the_definition(positions, aggregation, normalize, shift, limit):
    config = RepresentationConfig(
        positions=positions, k=3, aggregation=aggregation, normalize=normalize, shift=shift, layers=[1, 2]
    )
    rollouts = make_rollouts()
    generator = torch.Generator().manual_seed(0)
    states, sequences = {}, []
    for rollout in rollouts:
        length = len(rollout.prompt_ids) + len(rollout.response_ids)
        student, teacher = (
            {layer: torch.randn(length, 6, generator=generator, dtype=torch.float64) for layer in (1, 2)}
            for _ in range(2)
        )
        states[rollout.prompt_ids[0]] = (student, teacher)
        sequences.append((student, teacher, len(rollout.prompt_ids), rollout.response_mask))
    expected = oprd_loss(
        [(1, 1), (2, 2)], sequences, mode=positions, k=3, normalize=normalize, aggregation=aggregation, shift=shift
    )
    counts = count(selected_per_rollout(rollouts, config))
    assert counts.empty == 1 and counts.sequences == 4
    total = 0.0
    for batch in pack(rollouts, config, counts, max_tokens_per_micro_batch=limit, pad_to_multiple=2):
        # A sequence is known by its first token; 0 is padding.
        first_tokens = batch.tokens[batch.cu_seqlens[:-1].long()].tolist()
        rows = [states.get(token) for token in first_tokens]
        for layer in (1, 2):
            padding = torch.zeros(1, 6).double()
            packed = [torch.cat([row[side][layer] if row else padding for row in rows]) for side in (0, 1)]
            statistics = token_statistics(packed[0][batch.selected], packed[1][batch.selected], normalize)
            total += layer_sums(statistics, layer_weights(batch.weights, num_layers=2))[0].item()
    assert total == pytest.approx(expected.item(), rel=1e-12)


def test_a_batch_of_padding_selects_nothing():
    batch = empty_batch(pad_to_multiple=4)
    assert batch.num_tokens == 4 and batch.selected.numel() == 0 and batch.cu_seqlens.tolist() == [0, 4]


def test_a_rollout_that_does_not_fit_is_named():
    config = RepresentationConfig()
    rollouts = make_rollouts()
    with pytest.raises(UserError, match="max_tokens_per_micro_batch=4"):
        pack(rollouts, config, count(selected_per_rollout(rollouts, config)), max_tokens_per_micro_batch=4)
