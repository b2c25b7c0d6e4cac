"""FP8 beside bf16 on the same modules: states layer by layer, gradients, weights after an update, a short training."""

import itertools

import pytest
import torch

from megatron_oprd.hf.load import named_parameters
from tests.gpu.models import SMALL, TE, cosine, gradients, relative, run, save_model, sequences, training

# A product of E4M3 numbers is 3.7 % off; in random blocks, each adds its own to a stream that is little but them.
MOST = 0.12
RECIPES = ["tensorwise", "blockwise"]
STUDENT, TEACHERS = "precision.fp8=hybrid", ("precision.teacher_fp8=weights", "precision.teacher_fp8=compute")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("fp8") / "model")


def errors(gpu, folder, precision):
    """Return the relative error of each layer's hidden states."""
    rows = sequences(384)
    with torch.no_grad():
        exact, found = (run(gpu.load(folder, one).eval(), rows, gpu.device)[1] for one in (TE, precision))
    return {layer: relative(found[layer], state) for layer, state in exact.items()}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("setting", [STUDENT, *TEACHERS])
def test_the_error_of_every_layer_is_bounded(setting, recipe, folder, gpu):
    planned = gpu.precision(setting, f"precision.recipe={recipe}")
    found = errors(gpu, folder, planned.student if setting == STUDENT else planned.teacher)
    assert found.keys() == {1, 2, 3, 4}
    assert found[1] < 2e-3, "the first block stays in bf16"
    assert all(1e-3 < found[layer] < MOST for layer in (2, 3, 4)), found


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_keep_their_direction(recipe, folder, gpu):
    rows = sequences(384)
    precision = gpu.precision(STUDENT, f"precision.recipe={recipe}").student
    exact, found = (gradients(gpu.load(folder, one), rows, gpu.device) for one in (TE, precision))
    overall = cosine(*(torch.cat([one[name].flatten() for name in exact]) for one in (found, exact)))
    assert 0.97 < overall < 1 - 1e-6
    for name in exact:
        assert cosine(found[name], exact[name]) > 0.85, name


def test_the_second_update_uses_the_weights_of_the_first(gpu, tmp_path):
    """As a model does that is built with those weights, and has no FP8 copies of older ones."""
    folder = save_model(tmp_path / "small", **SMALL)
    reports, stage = training(gpu, folder, STUDENT)
    first = next(reports)
    weights = {name: parameter.detach().clone() for name, parameter in named_parameters(stage).items()}
    second = next(reports)
    fresh, _ = training(gpu, folder, STUDENT, weights=weights)
    assert second.loss == pytest.approx(next(fresh).loss, rel=1e-4)
    assert second.loss < 0.97 * first.loss, "an update that changes nothing shows nothing"


@pytest.mark.parametrize("recipe", RECIPES)
def test_twenty_steps_reach_the_loss_of_bf16(recipe, gpu, tmp_path):
    """At the size of the demo, as far as FP8 in blocks takes it: 4 blocks of width 128."""
    folder = save_model(tmp_path / "demo", **SMALL)
    in_fp8 = (STUDENT, f"precision.recipe={recipe}")
    plain, found = (
        [step.loss for step in itertools.islice(training(gpu, folder, *one)[0], 20)] for one in ((), in_fp8)
    )
    assert found == pytest.approx(plain, rel=0.05)
    assert found != plain and plain[-1] < 0.95 * plain[0]
