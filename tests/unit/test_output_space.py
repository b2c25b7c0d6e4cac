"""The output-space objectives have the values and the gradients that the method states, also at the extremes."""

import pytest
import torch

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.importance import position_weights
from megatron_oprd.losses.output_space import METRICS, token_objective
from megatron_oprd.losses.vocabulary import VocabularyShard
from megatron_oprd.testing.output_reference import token_loss, token_metrics, top_ids
from tests.helpers.output_objectives import every_config

VOCABULARY, TOKENS = 23, 4
CONFIGS = list(every_config(ks=(1, 3, 16, VOCABULARY)))
EXTREME_CONFIGS = list(every_config(ks=(1, 3, VOCABULARY, 1000)))
# The adaptive divergence holds its weights constant, so its gradient is not that of its value.
EXACT = [
    config
    for config in EXTREME_CONFIGS
    if config.objective in ("topk_kl", "full_kl") and config.direction != "adaptive"
]


def name(config):
    options = [config.objective] + ["gated"] * (config.forward_above_entropy is not None)
    if config.objective.startswith("topk"):
        options += [config.support, f"k{config.k}"] + ["tail"] * config.tail_bucket
    if config.objective.endswith("kl"):
        options += [config.direction] + [f"beta{config.beta}"] * (config.direction == "jsd")
    return "-".join(options)


def compute(student, teacher, token_ids, config, with_metrics=False):
    return token_objective(
        student.clone(), teacher.clone(), token_ids, VocabularyShard(), config, with_metrics=with_metrics
    )


def random_logits(dtype=torch.float64, tokens=TOKENS, vocabulary=VOCABULARY, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        (scale * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)
    )
    return student, teacher, torch.randint(vocabulary, (tokens,), generator=generator)


def extreme_logits(dtype=torch.float64):
    """Logits of up to +-80, also one-hot: models that agree, that disagree and that are sure where the other is not."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    spread = torch.linspace(-80, 80, VOCABULARY, dtype=torch.float64)[torch.randperm(VOCABULARY, generator=generator)]
    # A little noise on a one-hot model: a finite difference must not change a ranking.
    first, last = (noise / 100 - 80 for _ in range(2))
    first[0], last[-1] = 80, 80
    pairs = [(noise, first), (first, noise), (first, last), (last, last + noise / 100), (spread, -spread)]
    pairs += [(spread, first), (first, spread), (spread, spread.flip(0))]
    student, teacher = (torch.stack(side).to(dtype) for side in zip(*pairs, strict=True))
    return student, teacher, torch.arange(len(pairs)) % VOCABULARY


def reference(student, teacher, token_ids, config):
    leaf = student.double().requires_grad_()
    values = [token_loss(*token, config) for token in zip(leaf, teacher, token_ids.tolist(), strict=True)]
    (gradient,) = torch.autograd.grad(sum(values), leaf, allow_unused=True)
    return torch.stack(values).detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_value_and_gradient_are_those_of_the_definition(config, dtype):
    student, teacher, token_ids = random_logits(dtype)
    result = compute(student, teacher, token_ids, config)
    value, gradient = reference(student, teacher, token_ids, config)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    assert result.value.dtype == result.gradient.dtype == dtype and result.metrics is None
    torch.testing.assert_close(result.value.double(), value, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(result.gradient.double(), gradient, rtol=tolerance, atol=tolerance)


def test_the_surrogate_on_the_whole_vocabulary_has_the_gradient_of_reverse_kl():
    student, teacher, token_ids = random_logits()
    surrogate = compute(student, teacher, token_ids, OutputConfig(objective="topk_surrogate", k=VOCABULARY))
    full = compute(student, teacher, token_ids, OutputConfig(objective="full_kl"))
    torch.testing.assert_close(surrogate.gradient, full.gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("options", [{"objective": "full_kl"}, {"objective": "topk_kl", "k": 5, "tail_bucket": True}])
@pytest.mark.parametrize(("end", "direction"), [(0.0, "forward"), (1.0, "reverse")])
def test_jsd_tends_to_forward_and_reverse_kl(options, end, direction):
    student, teacher, token_ids = random_logits(scale=0.5)
    kl = compute(student, teacher, token_ids, OutputConfig(**options, direction=direction))
    at_the_end = compute(student, teacher, token_ids, OutputConfig(**options, direction="jsd", beta=end))
    assert torch.equal(kl.value, at_the_end.value) and torch.equal(kl.gradient, at_the_end.gradient)
    near = compute(student, teacher, token_ids, OutputConfig(**options, direction="jsd", beta=abs(end - 1e-4)))
    torch.testing.assert_close(near.value / 1e-4, kl.value, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(near.gradient / 1e-4, kl.gradient, rtol=1e-3, atol=1e-4)


def test_the_sampled_gradient_is_unbiased():
    draws = 20_000
    student, teacher, _ = random_logits(tokens=1, vocabulary=11, scale=1.0)
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.multinomial(student[0].softmax(-1), draws, replacement=True, generator=generator)
    sampled = compute(
        student.repeat(draws, 1), teacher.repeat(draws, 1), token_ids, OutputConfig(objective="sampled"), True
    )
    full = compute(student, teacher, token_ids[:1], OutputConfig(objective="full_kl"))
    estimates = torch.cat([sampled.gradient, sampled.metrics[:, METRICS.index("sampled_kl")][:, None]], dim=1)
    error = estimates.mean(0) - torch.cat([full.gradient[0], full.value])
    assert torch.all(error.abs() < 4 * estimates.std(0) / draws**0.5)
    assert torch.all(full.gradient.abs().max() > 20 * estimates.std(0) / draws**0.5), "the test could not tell"


@pytest.mark.parametrize("config", EXACT, ids=name)
def test_gradients_agree_with_finite_differences_at_the_extremes(config):
    student, teacher, token_ids = extreme_logits()
    gradient = compute(student, teacher, token_ids, config).gradient
    step = 1e-4
    for column in range(VOCABULARY):
        moved = step * torch.nn.functional.one_hot(torch.tensor(column), VOCABULARY).double()
        up, down = (compute(side, teacher, token_ids, config).value for side in (student + moved, student - moved))
        torch.testing.assert_close((up - down) / (2 * step), gradient[:, column], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("config", EXTREME_CONFIGS, ids=name)
def test_extreme_logits_give_finite_and_right_numbers(config):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        student, teacher, token_ids = extreme_logits(dtype)
        if dtype == torch.bfloat16:
            student, teacher = student.float(), teacher.float()
        result = compute(student, teacher, token_ids, config, with_metrics=True)
        assert result.value.isfinite().all() and result.gradient.isfinite().all() and result.metrics.isfinite().all()
        value, gradient = reference(student, teacher, token_ids, config)
        tolerance = 1e-10 if dtype == torch.float64 else 3e-5  # two units in the last place of a log-probability, -160
        # These two multiply a difference of log-probabilities by one.
        scale = 160 if config.objective in ("sampled", "topk_surrogate") else 1
        torch.testing.assert_close(result.value.double(), value, rtol=tolerance, atol=scale * tolerance)
        torch.testing.assert_close(result.gradient.double(), gradient, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", [1e-9, 1 - 1e-9])
def test_a_beta_that_float32_rounds_to_an_end_gives_finite_numbers(beta):
    config = OutputConfig(objective="full_kl", direction="jsd", beta=beta)
    result = compute(*extreme_logits(torch.float32), config)
    assert result.value.isfinite().all() and result.gradient.isfinite().all()


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_a_skew_of_zero_is_the_plain_divergence(direction):
    for options in ({"objective": "full_kl"}, {"objective": "topk_kl", "k": 5}):
        plain = compute(*random_logits(), OutputConfig(**options, direction=direction))
        skewed = compute(*random_logits(), OutputConfig(**options, direction=f"skew_{direction}", skew=0.0))
        assert torch.equal(plain.value, skewed.value) and torch.equal(plain.gradient, skewed.gradient)


def test_the_adaptive_divergence_weighs_by_where_the_models_differ():
    """The divergence is forward KL if only likely tokens differ, and reverse KL if only tokens of the tail differ."""
    teacher = torch.tensor([[0.4, 0.2, 0.2, 0.1, 0.1]], dtype=torch.float64)  # the tail: 0.1 and 0.1, not 0.2
    moved = {
        "forward": torch.tensor([[-0.3, 0.2, 0.1, 0.0, 0.0]], dtype=torch.float64),
        "reverse": torch.tensor([[0.0, 0.0, 0.0, 0.05, -0.05]], dtype=torch.float64),
    }
    for direction, change in moved.items():
        models = (teacher + change).log(), teacher.log(), torch.zeros(1, dtype=torch.int64)
        for options in ({"objective": "full_kl"}, {"objective": "topk_kl", "k": 5}):
            adaptive, plain = (compute(*models, OutputConfig(**options, direction=d)) for d in ("adaptive", direction))
            torch.testing.assert_close(adaptive.value, plain.value, rtol=1e-12, atol=0)
            torch.testing.assert_close(adaptive.gradient, plain.gradient, rtol=1e-12, atol=1e-15)


def test_weights_by_position_fall_with_the_disagreement_that_lies_before():
    log_ratios = torch.tensor([[-3.0, 1.0, 0.0, 4.0], [7.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 9.0]])
    weights = position_weights(log_ratios, torch.tensor([4, 1, 3]), 0.5)
    expected = [[1.5, 1.5 - 3 / 16, 1.25, 1.25], [1.5] * 4, [1.5] * 4]  # repeated after the end of a response
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


def test_an_entropy_that_no_token_exceeds_is_the_sampled_objective():
    plain = compute(*random_logits(), OutputConfig(objective="sampled"))
    gated = compute(*random_logits(), OutputConfig(objective="sampled", forward_above_entropy=4.0, k=5))
    assert torch.equal(plain.value, gated.value) and torch.equal(plain.gradient, gated.gradient)


def test_the_forward_term_exists_only_above_the_entropy():
    logits = random_logits(tokens=40)
    plain = compute(*logits, OutputConfig(objective="sampled"))
    gated = compute(*logits, OutputConfig(objective="sampled", forward_above_entropy=2.0, k=5))
    log_q = logits[1].log_softmax(-1)
    is_open = -(log_q.exp() * log_q).sum(-1) > 2.0
    assert 5 < is_open.sum() < 35 and torch.equal((gated.value != plain.value), is_open)


# The forward term of the gated objective is not renormalised: for equal models it has a gradient.
ZERO_FOR_EQUAL = [config for config in EXTREME_CONFIGS if config.forward_above_entropy is None]


@pytest.mark.parametrize("config", ZERO_FOR_EQUAL, ids=name)
def test_equal_logits_give_exactly_zero(config):
    for dtype in (torch.float64, torch.float32):
        for logits in (random_logits(dtype)[0], extreme_logits(dtype)[0]):
            result = compute(logits, logits, torch.arange(len(logits)), config)
            assert not result.value.any() and not result.gradient.any()


@pytest.mark.parametrize("k", [1, 3, 16, VOCABULARY])
@pytest.mark.parametrize("support", ["student", "teacher", "union"])
@pytest.mark.parametrize("objective", ["sampled", "topk_surrogate", "topk_kl", "full_kl"])
def test_metrics_are_those_of_the_definition(objective, support, k):
    config = OutputConfig(objective=objective, support=support, k=k)
    student, teacher, token_ids = random_logits(tokens=12, seed=2)
    teacher[:6, 0] = student[:6, 0] = 9
    plain, result = (compute(student, teacher, token_ids, config, with_metrics=flag) for flag in (False, True))
    assert torch.equal(plain.value, result.value) and torch.equal(plain.gradient, result.gradient)
    assert result.metrics.shape == (12, len(METRICS))
    expected = [token_metrics(*token, config) for token in zip(student, teacher, token_ids.tolist(), strict=True)]
    assert {token["argmax_agreement"] for token in expected} == {0.0, 1.0}
    for column, metric in enumerate(METRICS):
        wanted = torch.tensor([token[metric] for token in expected], dtype=torch.float64)
        torch.testing.assert_close(result.metrics[:, column], wanted, rtol=1e-10, atol=1e-12, msg=metric)


@pytest.mark.parametrize("config", CONFIGS, ids=name)
def test_no_tokens_are_no_numbers(config):
    student, teacher, token_ids = random_logits(tokens=0)
    result = compute(student, teacher, token_ids, config, with_metrics=True)
    assert result.value.shape == (0,) and result.gradient.shape == (0, VOCABULARY)
    assert result.metrics.shape == (0, len(METRICS))


@pytest.mark.parametrize("k", [1, 3, 7, 22, 23, 40])
def test_of_equal_logits_the_lower_id_ranks_higher(k):
    logits = torch.randint(4, (50, VOCABULARY), generator=torch.Generator().manual_seed(0)).float()
    assert VocabularyShard().top(logits, k).tolist() == [top_ids(row, k) for row in logits]
