"""Tokens are sampled with the probabilities of temperature, top-k and top-p, from the given uniform numbers only."""

import numpy as np
import pytest
import torch
import transformers

from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.sampling import BLOCK, inverse_cdf, sample, token_weights, uniforms

SETTINGS = {
    "plain": Sampling(temperature=1.0),
    "hot": Sampling(temperature=1.7),
    "top_k": Sampling(temperature=0.7, top_k=12),
    "top_p": Sampling(temperature=1.0, top_p=0.8),
    "top_k then top_p": Sampling(temperature=1.3, top_k=30, top_p=0.6),
    "top_p that keeps one": Sampling(temperature=1.0, top_p=1e-6),
    "top_k above the vocabulary": Sampling(temperature=1.0, top_k=10_000),
}


def random_logits(rows, vocabulary, seed=0):
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


def reference_probabilities(logits, sampling):
    """Return the probabilities of Hugging Face's logits processors, in float64."""
    warpers = transformers.LogitsProcessorList([transformers.TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(transformers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(sampling.top_p))
    return warpers(None, logits.double()).softmax(dim=-1)


@pytest.mark.parametrize("name", SETTINGS)
def test_probabilities_equal_hugging_face(name):
    logits = random_logits(20, 700)
    weights = token_weights(logits, SETTINGS[name]).double()
    torch.testing.assert_close(
        weights / weights.sum(-1, keepdim=True), reference_probabilities(logits, SETTINGS[name]), rtol=1e-5, atol=1e-9
    )


@pytest.mark.parametrize("name", SETTINGS)
def test_frequencies_follow_the_probabilities(name):
    vocabulary, draws, sampling = BLOCK + 40, 40_000, SETTINGS[name]
    logits = random_logits(1, vocabulary)
    expected = reference_probabilities(logits, sampling)[0].numpy() * draws
    numbers = torch.from_numpy(uniforms(0, 0, 0, 0, draws))
    counts = np.zeros(vocabulary)
    for part in numbers.split(1000):
        counts += np.bincount(sample(logits.expand(len(part), -1), sampling, part), minlength=vocabulary)
    assert counts.sum() == draws and not counts[expected == 0].any()
    often = expected >= 5  # the chi-square approximation needs that
    statistic = ((counts[often] - expected[often]) ** 2 / expected[often]).sum()
    freedom = max(int(often.sum()) - 1, 1)
    assert statistic < freedom + 5 * np.sqrt(2 * freedom)
    assert abs(counts[~often].sum() - expected[~often].sum()) < 5 * np.sqrt(expected[~often].sum() + 1)


def test_the_cumulative_weights_are_inverted_exactly():
    weights = token_weights(random_logits(300, 3 * BLOCK + 77), SETTINGS["plain"])
    numbers = torch.from_numpy(np.random.default_rng(1).random(300))
    ends = weights.double().cumsum(-1)
    expected = torch.searchsorted(ends, (numbers * ends[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(inverse_cdf(weights, numbers), expected)


# 1 is not drawn, but a product with the total can round up to the total.
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53, 1.0])
def test_a_token_of_weight_zero_is_never_drawn(number):
    vocabulary = 2 * BLOCK + 9
    weights = torch.zeros(vocabulary, vocabulary).fill_diagonal_(1e-30)
    numbers = torch.full((vocabulary,), number, dtype=torch.float64)
    assert torch.equal(inverse_cdf(weights, numbers), torch.arange(vocabulary))


def test_temperature_zero_selects_the_most_likely_token():
    logits = random_logits(50, 300)
    assert torch.equal(sample(logits, Sampling(temperature=0.0, top_k=5, top_p=0.5), None), logits.argmax(-1))
    almost = sample(logits, Sampling(temperature=1e-6), torch.rand(50, dtype=torch.float64))
    assert torch.equal(almost, logits.argmax(-1))


def test_a_row_does_not_depend_on_other_rows():
    logits, numbers = random_logits(40, 900), torch.rand(40, dtype=torch.float64)
    for sampling in SETTINGS.values():
        batched = sample(logits, sampling, numbers)
        alone = torch.cat([sample(logits[i : i + 1], sampling, numbers[i : i + 1]) for i in range(40)])
        assert torch.equal(batched, alone)


def test_uniform_numbers_depend_on_seed_step_prompt_and_sample():
    first = uniforms(1, 2, 3, 4, 10)
    assert np.array_equal(uniforms(1, 2, 3, 4, 6), first[:6])
    for other in ((0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (1, 2, 3, 0), (2, 1, 3, 4)):
        assert not np.isin(uniforms(*other, 10), first).any()
