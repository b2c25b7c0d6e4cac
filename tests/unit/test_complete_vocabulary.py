"""The functions that a GPU compiles, run as they are written: values and gradients of the method's definition."""

import pytest
import torch

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.complete_vocabulary import Logits, complete_objective, is_supported
from megatron_oprd.losses.vocabulary import VocabularyShard
from tests.unit.test_output_space import CONFIGS, extreme_logits, name, random_logits, reference

SUPPORTED = [config for config in CONFIGS if is_supported(config)]


def compute(student, teacher, token_ids, config, temperature=1.0, scale=1.0):
    models = Logits(student.clone(), temperature), Logits(teacher.clone(), config.teacher_temperature)
    scales = torch.full((len(student),), scale, dtype=torch.float64)
    return complete_objective(*models, token_ids, VocabularyShard(), config, scales)


def test_both_directions_and_the_sampled_token_are_supported():
    assert {name(config) for config in SUPPORTED} == {"sampled", "full_kl-reverse", "full_kl-forward"}
    assert not is_supported(OutputConfig(objective="sampled", forward_above_entropy=0.8))


@pytest.mark.parametrize("config", SUPPORTED, ids=name)
@pytest.mark.parametrize("inputs", [random_logits, extreme_logits])
def test_value_and_gradient_are_those_of_the_definition(config, inputs):
    student, teacher, token_ids = inputs()
    config = config.model_copy(update={"teacher_temperature": 0.7})
    found = compute(student, teacher, token_ids, config, temperature=1.3, scale=0.4)
    values, gradient = reference(student / 1.3, teacher / 0.7, token_ids, config)
    torch.testing.assert_close(found.value, values, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found.gradient, 0.4 * gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("config", SUPPORTED, ids=name)
def test_bf16_logits_are_rounded_once(config):
    """As the gradient of the exact objective of these logits, rounded to bf16; it takes the memory of the logits."""
    student, teacher, token_ids = (x.bfloat16() if x.is_floating_point() else x for x in random_logits())
    logits = Logits(student.clone())
    result = complete_objective(
        logits, Logits(teacher), token_ids, VocabularyShard(), config, torch.ones(len(student), dtype=torch.float64)
    )
    _, exact = reference(student, teacher.double(), token_ids, config)
    assert result.gradient.data_ptr() == logits.values.data_ptr()
    torch.testing.assert_close(result.gradient.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("config", SUPPORTED, ids=name)
def test_equal_logits_give_exactly_zero(config):
    student, _, token_ids = extreme_logits(torch.float32)
    found = compute(student, student, token_ids, config)
    assert found.value.abs().max() == 0 and found.gradient.abs().max() == 0
