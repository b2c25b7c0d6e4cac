"""The loss on hidden flow in a run: its limits, cuts that change nothing, and refusals."""

import pytest
import torch

from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import make_config
from megatron_oprd.testing.update import measure_update
from megatron_oprd.train import one_step
from megatron_oprd.types import UserError
from tests.helpers.training import make_run

FLOW = ("loss.flow={weight: 0.5, positions: 5}",)
ALONE = ("loss.representation.weight=0", *FLOW)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 3}
    return tuple(save(random_hf_model("Qwen3", seed, **sizes), folder / str(seed)) for seed in (0, 1))


def update(models, *overrides):
    return measure_update(make_run(*models, *overrides), one_step)


def assert_same_gradients(actual, expected, rtol):
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(actual.gradients[name], gradient, rtol=0, atol=rtol * gradient.norm().item())


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(models):
    found = update((models[0], models[0]), *ALONE)
    assert found.loss == 0.0 and not any(gradient.any() for gradient in found.gradients.values())
    assert {found.metrics[f"flow/{name}"] for name in ("loss", "direction", "geometry", "adjacent")} == {0.0}


def test_a_weight_of_zero_is_no_flow(models):
    plain, without = update(models), update(models, "loss.flow={weight: 0, positions: 5}")
    assert plain.loss == without.loss and not any(name.startswith("flow") for name in without.metrics)
    assert all(torch.equal(without.gradients[name], gradient) for name, gradient in plain.gradients.items())


def test_the_loss_is_the_weighted_sum_of_its_parts_and_counts_beside_other_losses(models):
    both, alone, states = update(models, *FLOW), update(models, *ALONE), update(models)
    parts = [alone.metrics[f"flow/{name}"] for name in ("direction", "geometry", "adjacent")]
    assert alone.loss == pytest.approx(0.5 * (parts[0] / 4 + parts[1] / 4 + parts[2] / 2), rel=1e-12)
    assert both.loss == pytest.approx(alone.loss + states.loss, rel=1e-6)
    for name, gradient in both.gradients.items():
        total = states.gradients[name] + alone.gradients[name]
        torch.testing.assert_close(gradient, total, rtol=0, atol=1e-5 * total.norm().item())


@pytest.mark.parametrize(
    "cut", ["batch.packing=false", "batch.max_tokens_per_micro_batch=64", "recompute.granularity=full"]
)
def test_micro_batches_and_recomputation_change_nothing(models, cut):
    plain, changed = update(models, *ALONE), update(models, *ALONE, cut)
    assert changed.loss == pytest.approx(plain.loss, rel=1e-6)
    assert_same_gradients(changed, plain, 1e-5)


def test_several_teachers_are_refused(models):
    with pytest.raises(UserError, match=r"loss.flow.weight=0.5 compares with one teacher"):
        make_config(models[0], {"math": models[1], "code": models[1]}, *FLOW)
