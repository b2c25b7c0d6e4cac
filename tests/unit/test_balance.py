"""Sequences are assigned to ranks and micro-batches by cost. None is lost, and no micro-batch is too long."""

import itertools
import random

import pytest

from megatron_oprd.data.balance import assign, sequence_cost
from megatron_oprd.types import UserError
from tests.helpers.specs import tiny_spec

# The sizes of Qwen3-1.7B.
SPEC = tiny_spec(
    num_layers=28, hidden_size=2048, ffn_hidden_size=6144, num_attention_heads=16, num_query_groups=8, head_dim=128
)


def lengths_of(seed, count, longest=16000):
    generator = random.Random(seed)
    return [generator.randint(1, longest) for _ in range(count)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("ranks", "count", "multiple"), [(1, 7, 1), (2, 3, 2), (4, 16, 1), (8, 5, 4), (3, 0, 2)])
@pytest.mark.parametrize("packing", [True, False])
def test_every_sequence_is_in_one_micro_batch_with_room(seed, ranks, count, multiple, packing):
    lengths = lengths_of(seed, count)
    shares = assign(lengths, lengths, ranks, 16000, multiple=multiple, packing=packing)
    batches = list(itertools.chain(*shares))
    assert sorted(itertools.chain(*batches)) == list(range(count))
    assert all(sum(lengths[i] for i in members) <= 16000 for members in batches)
    assert packing or all(len(members) <= 1 for members in batches)
    assert len({len(share) for share in shares}) == 1 and len(shares[0]) >= 1 and len(shares[0]) % multiple == 0


@pytest.mark.parametrize("seed", range(5))
def test_cost_is_balanced_over_ranks_and_not_tokens(seed):
    lengths = lengths_of(seed, 128)
    costs = [sequence_cost(length, SPEC) for length in lengths]
    loads = [sum(costs[i] for i in itertools.chain(*share)) for share in assign(lengths, costs, 8, 32768)]
    contiguous = [sum(costs[16 * rank : 16 * rank + 16]) for rank in range(8)]
    assert max(loads) / min(loads) < 1.05 < max(contiguous) / min(contiguous)


def test_cost_grows_faster_than_the_length():
    ratio = sequence_cost(32768, SPEC) / (32 * sequence_cost(1024, SPEC))
    # Per block and token: 2048 * (2*2048 + 2*1024 + 3*6144) multiply-adds in the matrices, 2048 * tokens in attention.
    matrices = 2048 * (2 * 2048 + 2 * 1024 + 3 * 6144)
    assert ratio == pytest.approx((matrices + 2048 * 32768) / (matrices + 2048 * 1024))


def test_a_sequence_that_does_not_fit_raises_an_error():
    with pytest.raises(UserError, match="max_tokens_per_micro_batch=4 is less than a rollout of 9 tokens"):
        assign([3, 9], [3, 9], 2, 4)


def test_first_fit_is_used_if_balancing_needs_too_many_micro_batches():
    # By cost the two long ones would take the room that the three others need.
    lengths = [6, 5, 5, 4, 4, 4, 2]
    shares = assign(lengths, [1.0] * 7, 1, 10)
    assert all(sum(lengths[i] for i in members) <= 10 for members in shares[0])
