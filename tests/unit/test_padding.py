"""Under FP8 the tokens of a rank are padded to a multiple. Padding is in no loss and changes no FP8 scale."""

import random

import pytest
import torch

from megatron_oprd.config import BatchConfig, LossConfig
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.types import Rollout
from tests.helpers.specs import ranks, tiny_spec

BATCH = BatchConfig(max_tokens_per_micro_batch=64)
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (1, 3, 2)]  # data, context and sequence ranks
SEEDS = range(4)


def global_batch(seed, pad_tokens):
    draw, made = random.Random(seed), []
    for _ in range(7):
        prompt, response = (tuple(draw.choices(range(9, 99), k=draw.randint(1, 20))) for _ in range(2))
        made.append(Rollout(prompt, response, (1,) * len(response), "replay"))
    return GlobalBatch(tuple(made), (0,) * len(made), LossConfig(), BATCH, tiny_spec(), pad_tokens)


def micro_batches(seed, pad_tokens, topology):
    return global_batch(seed, pad_tokens).micro_batches(topology)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("multiple", [16, 24, 128])
def test_the_tokens_of_every_rank_are_a_multiple(multiple, layout):
    for seed in SEEDS:
        for topology in ranks(*layout):
            for batch in micro_batches(seed, multiple, topology):
                of_hidden_states = batch.num_tokens // layout[2]
                assert of_hidden_states % multiple == 0 and batch.num_tokens % layout[2] == 0
                assert batch.host.bounds[-1] == batch.num_tokens * topology.context_size


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_padding_is_never_in_the_loss(layout):
    for seed in SEEDS:
        padded, plain = {}, {}
        for topology in ranks(*layout):
            for read, multiple in ((padded, 16), (plain, 1)):
                for batch in micro_batches(seed, multiple, topology):
                    chosen = batch.host.representation
                    hidden_rows = batch.tokens.chunk(layout[2])[topology.tensor_rank]
                    assert torch.equal(hidden_rows[chosen.selected], chosen.token_ids)
                    for row, token, weight in zip(chosen.token_numbers, chosen.token_ids, chosen.weights, strict=True):
                        assert int(row) not in read
                        read[int(row)] = int(token), float(weight)
        assert padded == plain and sorted(plain) == list(range(len(plain)))


def test_padding_repeats_the_first_tokens_of_the_micro_batch():
    (topology,) = ranks(1, 1, 1)
    seen = 0
    for seed in SEEDS:
        for batch in micro_batches(seed, 16, topology):
            start, end = batch.host.bounds[-2:]
            if not ((start <= batch.representation.selected) & (batch.representation.selected < end)).any():
                seen += 1
                assert torch.equal(batch.tokens[start:end], batch.tokens[: end - start])
                assert batch.position_ids[start:end].tolist() == list(range(end - start))
    assert seen
