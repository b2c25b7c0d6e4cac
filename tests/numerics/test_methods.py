"""Methods beyond the paper: each moves the weights by its gradient in float64, and its limits are the plain method."""

import dataclasses
import json

import pytest
import torch

from megatron_oprd.data.prompts import PromptState
from megatron_oprd.launch.setup import read_setup
from megatron_oprd.rollout.engine import FinishedRollouts
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.reference_update import reference_update
from megatron_oprd.testing.replayed_run import MANY, make_config, some_rollouts
from megatron_oprd.testing.update import assert_same_update, measure_update
from megatron_oprd.train import one_step
from megatron_oprd.training.state import LayerSquares, PendingStep, TrainState
from megatron_oprd.types import UserError
from tests.helpers.training import make_run

BOTH = ("loss.output.objective=full_kl", "loss.output.metrics_every=0")
CROSSFADE = "loss.schedule={representation: [[0, 1], [10, 0]], output: [[0, 0], [10, 1]]}"
VARYING = {"rollout/staleness", "memory/peak_bytes", "step", "grad_norm", "rep/multiplier", "output/multiplier"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 3}
    return tuple(save(random_hf_model("Qwen3", seed, **sizes), folder / str(seed)) for seed in (0, 1))


def update_at(step, models, *overrides):
    """Return the update after `step` updates that did not happen: the weights are those of the start."""

    def one(run, state):
        rollouts = FinishedRollouts(list(run.inputs.replayed))  # a replay file has none for a later step
        return one_step(run, TrainState(step, state.prompts, PendingStep(step, state.prompts, rollouts)))

    return measure_update(make_run(*models, *overrides), one)


def assert_same_bits(actual, expected, other_metrics=()):
    """Assert equal bits, but for `other_metrics` and for the gradient norm: its partial sums depend on which parameters
    have a gradient."""
    assert actual.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    kept = {name for name in expected.metrics if not name.startswith("time/")} - VARYING - {*other_metrics}
    assert {name: actual.metrics[name] for name in kept} == {name: expected.metrics[name] for name in kept}
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert torch.equal(actual.gradients[name], gradient), name


def test_multipliers_of_one_are_no_schedule(models):
    ones = "loss.schedule={representation: [[0, 1], [9, 1]], output: [[4, 1]]}"
    assert_same_bits(update_at(3, models, *BOTH, ones), update_at(3, models, *BOTH))


def test_weights_follow_the_schedule(models):
    layers, output = "loss.representation.weight=0.7", "loss.output.weight=0.3"
    expected = reference_update(*models, *BOTH, layers, output)
    actual = update_at(3, models, *BOTH, CROSSFADE)
    assert_same_update(actual, expected)
    assert (actual.metrics["rep/multiplier"], actual.metrics["output/multiplier"]) == (0.7, 0.3)


LAYERS, OUTPUT = ("loss.representation.layers=[1,2]",), ("loss.representation.weight=0", *BOTH)
FADE_OUT = "loss.schedule={output: [[0, 1], [10, 0]]}"


@pytest.mark.parametrize(
    ("schedule", "step", "alone"),
    [(CROSSFADE, 0, LAYERS), (CROSSFADE, 10, OUTPUT), (FADE_OUT, 11, LAYERS)],
)
def test_a_part_with_multiplier_zero_does_no_work(models, schedule, step, alone):
    both = update_at(step, models, *BOTH, schedule, *LAYERS)
    assert_same_bits(both, update_at(step, models, *alone))
    assert ("rep/mse" in both.metrics, "output/loss" in both.metrics) == (alone == LAYERS, alone == OUTPUT)


def test_a_teacher_without_rollouts_in_a_step_is_not_loaded(models):
    student, teacher = models
    teachers = {"math": teacher, "code": student}
    rollouts = [dataclasses.replace(rollout, data_source="math") for rollout in some_rollouts(131)]
    run, loaded = make_run(student, teachers, rollouts=rollouts), []

    def counted(name, of_run):
        return dataclasses.replace(of_run, load=lambda: loaded.append(name) or of_run.load())

    watched = tuple(counted(name, of_run) for name, of_run in zip(teachers, run.teachers, strict=True))
    run = dataclasses.replace(run, models=dataclasses.replace(run.models, teachers=watched))
    expected = reference_update(student, teachers, rollouts=rollouts)
    assert_same_update(measure_update(run, one_step), expected)
    assert loaded == ["math"]


@pytest.mark.parametrize("weights", ["[0.5,2.0,3.0]", "inverse_square"])
def test_layer_weights_multiply_the_gradients_of_the_layers(models, weights):
    setting = f"loss.representation.layer_weights={weights}"
    assert_same_update(update_at(0, models, setting), reference_update(*models, setting))


def test_layer_weights_of_one_are_equal(models):
    ones = "loss.representation.layer_weights=[1,1,1]"
    assert_same_bits(update_at(0, models, ones), update_at(0, models))


def test_layers_are_divided_by_the_running_mean_of_earlier_steps(models):
    run = make_run(*models, "loss.representation.layer_weights=inverse_square")
    rollouts = FinishedRollouts(list(run.inputs.replayed))
    known = LayerSquares(3, {1: 0.5, 2: 4.0, 3: 0.25})
    state = TrainState(3, pending=PendingStep(3, PromptState(), rollouts), squares=known)
    state, metrics, _ = one_step(run, state)
    assert [metrics[f"rep/factor/layer_{layer}"] for layer in (1, 2, 3)] == [2.0, 0.25, 4.0]
    by_layer = [metrics[f"rep/mse/layer_{layer}"] for layer in (1, 2, 3)]
    assert metrics["loss"] == pytest.approx((2 * by_layer[0] + by_layer[1] / 4 + 4 * by_layer[2]) / 3, rel=1e-12)
    first, _, _ = one_step(make_run(*models, "loss.representation.layer_weights=inverse_square"), TrainState())
    assert state.squares.steps == 4 and first.squares.steps == 1
    for layer, mean in known.means.items():
        assert state.squares.means[layer] == pytest.approx((3 * mean + first.squares.means[layer]) / 4, rel=1e-6)
    assert LayerSquares.from_dict(json.loads(json.dumps(state.squares.to_dict()))) == state.squares


def test_a_step_without_a_response_token_measures_no_squares(models):
    rollouts = some_rollouts(131, masks=((), ()))
    run = make_run(*models, "loss.representation.layer_weights=inverse_square", rollouts=rollouts)
    state, metrics, _ = one_step(run, TrainState())
    assert metrics["loss"] == 0.0 and state.squares == LayerSquares()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("layer_weights=[1.0,2.0]",), "2 factors for 3 compared layers"),
        (("layer_weights=inverse_square", "normalize=l2"), "no effect on states of length 1"),
        (("layer_weights=[1.0,-1.0,1.0]",), "greater than 0"),
    ],
)
def test_layer_weights_that_cannot_be_meant_are_refused(models, settings, message):
    with pytest.raises(UserError, match=message):
        make_run(*models, *(f"loss.representation.{one}" for one in settings))


LINEAR, FITTED = "loss.representation.map.kind=linear", "loss.representation.map.init=closed_form"


@pytest.mark.parametrize("normalize", ["l2", "none"])
def test_a_map_may_start_as_a_ridge_regression(models, normalize):
    """There are more tokens than dimensions: a perfect fit would leave nothing but rounding."""
    rollouts = some_rollouts(131, masks=MANY)
    settings = (LINEAR, FITTED, f"loss.representation.normalize={normalize}")
    update = measure_update(make_run(*models, *settings, rollouts=rollouts), one_step)
    assert_same_update(update, reference_update(*models, *settings, rollouts=rollouts))


def test_a_map_is_fitted_in_the_first_step_that_compares_hidden_states_alone(models):
    later = "loss.schedule={representation: [[0, 0], [1, 1]]}"
    for step, is_first in ((1, True), (2, False)):
        random, fitted = (update_at(step, models, *BOTH, later, LINEAR, *of) for of in ((), (FITTED,)))
        assert (fitted.metrics["rep/mse"] < random.metrics["rep/mse"] / 2) == is_first
        if not is_first:
            assert_same_bits(fitted, random)


def test_a_step_without_a_response_token_fits_no_map(models):
    run = make_run(*models, LINEAR, FITTED, rollouts=some_rollouts(131, masks=((), ())))
    before = {layer: one.weight.clone() for layer, one in run.student.maps.items()}
    one_step(run, TrainState())
    assert all(torch.equal(one.weight, before[layer]) for layer, one in run.student.maps.items())


def test_a_factor_of_one_never_opens_the_base(models, tmp_path):
    base = f"teacher.base={{path: {tmp_path / 'nowhere'}, extrapolate: 1.0}}"
    assert_same_bits(update_at(0, models, base), update_at(0, models))


@pytest.mark.parametrize("space", ["representation", "output", "both"])
def test_a_base_that_is_the_teacher_changes_no_bit(models, space):
    base = f"teacher.base={{path: {models[1]}, extrapolate: 1.7, space: {space}}}"
    assert_same_bits(update_at(0, models, *BOTH, base), update_at(0, models, *BOTH), ("teacher/target_bytes",))


def test_a_student_that_is_the_base_begins_with_the_square_of_the_factor_times_the_loss(models):
    plain = update_at(0, models)
    update = update_at(0, models, f"teacher.base={{path: {models[0]}, extrapolate: 1.25}}")
    assert update.loss == pytest.approx(1.25**2 * plain.loss, rel=1e-6)


def test_a_base_of_another_shape_and_a_base_without_its_loss_are_refused(models, tmp_path):
    narrow = save(random_hf_model("Qwen3", 3, num_hidden_layers=2), tmp_path / "narrow")
    config = make_config(*models, f"teacher.base.path={narrow}")
    with pytest.raises(UserError, match="has num_layers 2 instead of 3; a base is the model that the teacher"):
        read_setup(config, config.named_teachers)
    with pytest.raises(UserError, match=r"teacher.base extrapolates hidden states, and loss.representation.weight=0"):
        make_config(*models, *OUTPUT, f"teacher.base.path={models[0]}")
    with pytest.raises(UserError, match=r"teacher.base extrapolates distributions, and loss.output.objective=none"):
        make_config(*models, f"teacher.base.path={models[0]}", "teacher.base.space=both")


def test_teachers_with_and_without_a_base_teach_one_student(models):
    """Final states of one teacher have twice the width of the other's; each rollout is compared with its own."""
    teachers = {"math": models[1], "code": models[0]}
    settings = (*OUTPUT, f"teachers.math.base={{path: {models[0]}, extrapolate: 1.5, space: output}}")
    rollouts = [
        dataclasses.replace(rollout, data_source=name)
        for rollout, name in zip(some_rollouts(131), ["math", "code"] * 9, strict=False)
    ]
    update = measure_update(make_run(models[0], teachers, *settings, rollouts=rollouts), one_step)
    assert_same_update(update, reference_update(models[0], teachers, *settings, rollouts=rollouts))
