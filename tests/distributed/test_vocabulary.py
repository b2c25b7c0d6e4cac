"""Dividing a vocabulary over tensor-parallel ranks changes no value, no gradient and no ranking."""

import dataclasses
import functools

import pytest
import torch
import torch.distributed as dist

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses import vocabulary as vocabulary_module
from megatron_oprd.losses.complete_vocabulary import Logits, complete_objective, is_supported
from megatron_oprd.losses.output_space import METRICS, token_objective
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.testing.output_reference import top_ids
from tests.helpers.output_objectives import every_config

TOKENS = 6
UNDIVIDED = VocabularyShard()
# (ranks, vocabulary): 131 leaves a narrower last rank, 5 over four ranks gives the widths 2, 2, 1, 0.
LAYOUTS = [(2, 131), (4, 131), (4, 5)]


def shard_of(rank, ranks, vocabulary):
    """Return this rank's shard and columns, without the padding that makes the vocabulary a multiple of `ranks`."""
    width = -(-vocabulary // ranks)
    start = rank * width
    columns = slice(min(start, vocabulary), min(start + width, vocabulary))
    return VocabularyShard(start, dist.group.WORLD, width), columns


@functools.cache
def logits(vocabulary, dtype, tokens=TOKENS):
    """Return logits of both models and token ids. The logits of the third token are small integers with ties."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    student[2:3].mul_(2).round_()
    teacher[2:3].mul_(2).round_()
    return student.to(dtype), teacher.to(dtype), torch.randint(vocabulary, (tokens,), generator=generator)


def compute(shard, columns, config, vocabulary, dtype, tokens=TOKENS):
    student, teacher, token_ids = logits(vocabulary, dtype, tokens)
    # A copy of the columns: the objective overwrites them.
    student, teacher = (side[:, columns].clone() for side in (student, teacher))
    return token_objective(student, teacher, token_ids, shard, config, with_metrics=True)


def configs(vocabulary):
    # 1000 stands for the whole vocabulary, 3 is more than a shard of 2 holds.
    for config in every_config(ks=(3, 1000) if vocabulary < 10 else (1, 16)):
        if config.direction != "jsd" or 0 < config.beta < 1:  # the ends are the other directions
            yield config


def check_objectives(rank, ranks, vocabulary):
    """Compare with the undivided vocabulary. Return the bytes of the results that must be equal on all ranks."""
    shard, columns = shard_of(rank, ranks, vocabulary)
    bits = []
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
        for config in configs(vocabulary):
            cut = compute(shard, columns, config, vocabulary, dtype)
            undivided = compute(UNDIVIDED, slice(None), config, vocabulary, dtype)
            close(cut.value, undivided.value, msg=lambda text, config=config: f"value, {config}: {text}")
            close(
                cut.gradient,
                undivided.gradient[:, columns],
                msg=lambda text, config=config: f"gradient, {config}: {text}",
            )
            close(cut.metrics, undivided.metrics, msg=lambda text, config=config: f"metrics, {config}: {text}")
            if is_supported(config):
                student, teacher, token_ids = logits(vocabulary, dtype)
                models = (Logits(side[:, columns].clone()) for side in (student, teacher))
                compiled = complete_objective(*models, token_ids, shard, config, torch.ones(len(student)))
                close(compiled.value, undivided.value)
                close(compiled.gradient, undivided.gradient[:, columns])
            bits.append(torch.cat([cut.value, cut.metrics.flatten()]).numpy().tobytes())
    empty = compute(shard, columns, OutputConfig(objective="topk_kl", tail_bucket=True), vocabulary, dtype, tokens=0)
    assert empty.gradient.shape == (0, columns.stop - columns.start) and empty.metrics.shape == (0, len(METRICS))
    return bits


@pytest.mark.parametrize(("ranks", "vocabulary"), LAYOUTS)
def test_objectives_do_not_depend_on_the_number_of_ranks(ranks, vocabulary):
    bits = run_distributed(ranks, check_objectives, ranks, vocabulary)
    assert all(other == bits[0] for other in bits)


def lower_half(values):
    """Return for each token whether those that are not likelier have at most half of the probability."""
    probabilities = values.double().softmax(-1)
    not_likelier = values[:, None] <= values[:, :, None]
    return (not_likelier * probabilities[:, None]).sum(-1) <= 0.5


def check_shard(rank, ranks, vocabulary):
    shard, columns = shard_of(rank, ranks, vocabulary)
    generator = torch.Generator().manual_seed(0)
    smooth = torch.randn(40, vocabulary, generator=generator)
    tied = torch.randint(4, (40, vocabulary), generator=generator).float()
    low = torch.full((1, vocabulary), -torch.inf)
    ids = torch.randint(vocabulary, (40, 7), generator=generator)
    unknown = dataclasses.replace(shard, widest=None)
    for values in (smooth, tied, tied.double(), low):
        for k in (1, 2, 3, vocabulary - 1, vocabulary, vocabulary + 9):
            for one in (shard, unknown):
                assert one.top(values[:, columns], k).tolist() == [top_ids(row, k) for row in values]
    # Only in sharp rows do three candidates of each rank have half of the probability.
    sharp_and_flat = torch.cat([9 * smooth[:20], smooth[20:39], torch.zeros(1, vocabulary)])
    for vocabulary_module.CANDIDATES in (3, 1024):
        for values in (sharp_and_flat, tied):
            assert torch.equal(shard.lower_half(values[:, columns]), lower_half(values)[:, columns])
    for values in (smooth, smooth.double()):
        assert torch.equal(shard.gather(values[:, columns], ids), values.gather(1, ids))
        added = shard.add_(torch.zeros_like(values[:, columns]), ids[:, :1], values[:, :1])
        assert torch.equal(added, torch.zeros_like(values).scatter_(1, ids[:, :1], values[:, :1])[:, columns])
        normalized = values[:, columns].clone()
        log_sum = shard.normalize_(normalized)
        torch.testing.assert_close(normalized, values.log_softmax(-1)[:, columns])
        torch.testing.assert_close(log_sum[0], values.logsumexp(-1))
    assert shard.top(smooth[:0, columns], 3).shape[0] == 0
    assert shard.lower_half(smooth[:0, columns]).shape == (0, columns.stop - columns.start)
    assert shard.gather(smooth[:0, columns], ids[:0]).shape == (0, 7)
    assert shard.sum(torch.tensor([1.0 + rank])).item() == ranks * (ranks + 1) / 2
    assert shard.max(torch.tensor([1.0 + rank])).item() == ranks


@pytest.mark.parametrize(("ranks", "vocabulary"), LAYOUTS)
def test_rankings_and_look_ups_do_not_depend_on_the_number_of_ranks(ranks, vocabulary):
    run_distributed(ranks, check_shard, ranks, vocabulary)


def check_what_a_ranking_sends(rank, ranks, vocabulary):
    shard, columns = shard_of(rank, ranks, vocabulary)
    sent = []
    all_gather = dist.all_gather

    def recording(gathered, candidates, group):
        sent.append(tuple(candidates.shape))
        all_gather(gathered, candidates, group=group)

    dist.all_gather = recording
    for k in (1, 10**6):
        shard.top(torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(0))[:, columns], k)
    assert sent == [(2, 3, 1), (2, 3, shard.widest)]


@pytest.mark.parametrize(("ranks", "vocabulary"), LAYOUTS)
def test_a_ranking_sends_no_more_than_the_vocabulary(ranks, vocabulary):
    run_distributed(ranks, check_what_a_ranking_sends, ranks, vocabulary)
