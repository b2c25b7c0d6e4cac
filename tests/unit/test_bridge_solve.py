"""The closed form from moments equals least squares on the states, and its error is the mean over tokens."""

import pytest
import torch

from megatron_oprd.bridge.fitting.moments import Moments
from megatron_oprd.bridge.fitting.solve import _least_squares, check_ranks, fit_pair, held_out_error, teacher_directions
from megatron_oprd.types import UserError

RIDGES = [0.0, 1e-4, 1e-2, 1e-1]


def states(tokens, student_width=12, teacher_width=9, seed=0, mean=2.0, noise=0.3):
    """Return states of two models that share three directions, not centred, float64."""
    generator = torch.Generator().manual_seed(1)  # the models
    mix = torch.randn(3, student_width + teacher_width, dtype=torch.float64, generator=generator)
    offset = mean * torch.randn(student_width + teacher_width, dtype=torch.float64, generator=generator)
    generator = torch.Generator().manual_seed(seed)  # the tokens
    shared = torch.randn(tokens, 3, dtype=torch.float64, generator=generator)
    own = torch.randn(tokens, student_width + teacher_width, dtype=torch.float64, generator=generator)
    return (shared @ mix + offset + noise * own).split([student_width, teacher_width], dim=1)


def moments_of(student, teacher):
    moments = Moments.empty(student.shape[1], teacher.shape[1])
    moments.add(student, teacher)
    return moments


def projected(teacher, rank):
    """Return the principal directions by singular value decomposition (up to signs), and the centred states."""
    centred = teacher - teacher.mean(dim=0)
    return torch.linalg.svd(centred, full_matrices=False).Vh[:rank], centred


def error_of(bridge, student, teacher):
    z_student = student @ bridge.student_map.double().T
    z_teacher = (teacher - bridge.teacher_mean.double()) @ bridge.teacher_map.double().T
    return (z_student - z_teacher).square().sum(dim=1).mean().item()


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def test_directions_are_the_principal_components():
    _, teacher = states(400, mean=1e3)
    found = teacher_directions(moments_of(teacher, teacher), 4)
    directions, centred = projected(teacher, 4)
    assert relative(found.mean, teacher.mean(dim=0)) < 1e-12
    assert (found.directions.abs() - directions.abs()).abs().max() < 1e-9
    assert (found.directions @ found.directions.T - torch.eye(4)).abs().max() < 1e-12
    singular = torch.linalg.svdvals(centred)
    assert relative(found.eigenvalues, singular[:4].square() / 400) < 1e-9
    assert found.variance == pytest.approx(singular.square().sum().item() / 400, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_entry_of_a_direction_is_positive(seed):
    _, teacher = states(100, seed=seed)
    for direction in teacher_directions(moments_of(teacher, teacher), 9).directions:
        assert direction[direction.abs().argmax()] > 0


def test_a_fit_without_ridge_is_least_squares():
    student, teacher = states(300)
    train = moments_of(student, teacher)
    directions = teacher_directions(train, 5)
    (found,) = _least_squares(train, directions, [0.0])
    targets = (teacher - teacher.mean(dim=0)) @ directions.directions.T
    expected = torch.linalg.lstsq(student, targets).solution.T
    assert relative(found, expected) < 1e-9


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_a_ridge_is_least_squares_with_rows_added(ridge):
    student, teacher = states(300)
    train = moments_of(student, teacher)
    directions = teacher_directions(train, 5)
    (found,) = _least_squares(train, directions, [ridge])
    # The mean over 300 tokens plus lambda ||P||^2, times 300.
    strength = ridge * student.square().sum() / 300 / 12
    rows = (300 * strength).sqrt() * torch.eye(12, dtype=torch.float64)
    targets = (teacher - teacher.mean(dim=0)) @ directions.directions.T
    expected = torch.linalg.lstsq(
        torch.cat([student, rows]), torch.cat([targets, torch.zeros(12, 5, dtype=torch.float64)])
    ).solution.T
    assert relative(found, expected) < 1e-9


def test_directions_without_student_variance_get_no_weight():
    student, teacher = states(300)
    student = torch.cat([student, student[:, :4] - student[:, 4:8], torch.zeros(300, 1, dtype=torch.float64)], dim=1)
    train = moments_of(student, teacher)
    directions = teacher_directions(train, 5)
    targets = (teacher - teacher.mean(dim=0)) @ directions.directions.T
    expected = torch.linalg.lstsq(student, targets, driver="gelsd").solution.T
    (found,) = _least_squares(train, directions, [0.0])
    assert relative(found, expected) < 1e-9


def test_a_smaller_rank_is_the_first_rows_of_a_larger_one():
    train, held_out = (moments_of(*states(300, seed=seed)) for seed in (0, 1))
    fits = fit_pair(train, held_out, [2, 5], [1e-3])
    alone = fit_pair(train, held_out, [2], [1e-3])[2]
    for fit in (fits[2], alone):
        assert torch.equal(fit.bridge.student_map, fits[5].bridge.student_map[:2])
        assert torch.equal(fit.bridge.teacher_map, fits[5].bridge.teacher_map[:2])
    assert fits[2].error == alone.error
    assert len(fits[2].eigenvalues) == 2
    assert fits[2].explained_variance < fits[5].explained_variance < 1
    _, teacher = states(300)
    share = torch.linalg.svdvals(teacher - teacher.mean(dim=0)).square()
    assert fits[5].explained_variance == pytest.approx((share[:5].sum() / share.sum()).item(), rel=1e-9)


@pytest.mark.parametrize("mean", [2.0, 1e3])
def test_the_error_is_the_mean_over_the_held_out_tokens(mean):
    train = moments_of(*states(300, mean=mean))
    student, teacher = states(150, seed=1, mean=mean)
    teacher = teacher + 1.5  # the held-out mean is another than the training mean
    held_out = moments_of(student, teacher)
    fit = fit_pair(train, held_out, [4], [1e-4])[4]
    assert fit.error == held_out_error(fit.bridge, held_out)
    assert fit.error == pytest.approx(error_of(fit.bridge, student, teacher), rel=1e-9)
    z_teacher = (teacher - fit.bridge.teacher_mean.double()) @ fit.bridge.teacher_map.double().T
    assert fit.total == pytest.approx(z_teacher.square().sum(dim=1).mean().item(), rel=1e-9)


def test_the_ridge_is_the_one_with_the_least_held_out_error():
    chosen = set()
    for tokens in (16, 2000):  # few tokens to overfit, and many
        train = moments_of(*states(tokens, noise=1.0))
        student, teacher = states(500, seed=1, noise=1.0)
        fits = fit_pair(train, moments_of(student, teacher), [1, 5], RIDGES)
        for rank, fit in fits.items():
            errors = [
                error_of(fit_pair(train, moments_of(student, teacher), [rank], [ridge])[rank].bridge, student, teacher)
                for ridge in RIDGES
            ]
            assert fit.ridge == RIDGES[errors.index(min(errors))]
            assert fit.error == pytest.approx(min(errors), rel=1e-6)
            chosen.add(fit.ridge)
    assert len(chosen) > 1


def test_a_student_that_is_the_teacher_is_matched_exactly():
    _, teacher = states(300, mean=0.0)
    teacher = teacher - teacher.mean(dim=0)  # the map has no bias
    fit = fit_pair(moments_of(teacher, teacher), moments_of(teacher, teacher), [9], RIDGES)[9]
    assert fit.ridge == 0.0
    assert fit.error < 1e-12 * fit.total
    assert fit.explained_variance == pytest.approx(1.0)
    assert relative(fit.bridge.student_map, fit.bridge.teacher_map) < 1e-6


def test_given_directions_are_used_as_they_are():
    train, held_out = (moments_of(*states(300, seed=seed)) for seed in (0, 1))
    given = teacher_directions(train, 7)
    fit = fit_pair(train, held_out, [3], RIDGES, given)[3]
    assert torch.equal(fit.bridge.teacher_map, given.directions[:3].float())
    assert torch.equal(fit.bridge.student_map, fit_pair(train, held_out, [3], RIDGES)[3].bridge.student_map)


def test_constant_states_give_a_zero_map():
    constant = moments_of(torch.zeros(20, 12), torch.ones(20, 9))
    fit = fit_pair(constant, constant, [2], [0.0])[2]
    assert not fit.bridge.student_map.any()
    assert (fit.error, fit.explained_variance) == (0.0, 0.0)


def test_a_rank_beyond_a_hidden_size_is_refused():
    check_ranks([1, 9], 12, 9)
    with pytest.raises(UserError, match=r"bridge\.ranks: 10 is more than 9.*ranks go up to 9"):
        check_ranks([1, 10], 12, 9)
    with pytest.raises(UserError, match=r"bridge\.ranks: 10 is more than 9"):
        fit_pair(moments_of(*states(30)), moments_of(*states(30)), [10], [0.0])


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [(0, 30, "more than 5 training tokens, there are 0"), (30, 5, "more than 5 held-out tokens, there are 5")],
)
def test_too_few_tokens_are_refused(train, held_out, message):
    with pytest.raises(UserError, match=message):
        fit_pair(moments_of(*states(train)), moments_of(*states(held_out)), [2, 5], [0.0])


@pytest.mark.parametrize(("model", "bad"), [("student", float("nan")), ("teacher", float("inf"))])
def test_states_that_are_not_finite_are_refused(model, bad):
    student, teacher = states(30)
    broken = {"student": student.clone(), "teacher": teacher.clone()}
    broken[model][3, 4] = bad
    with pytest.raises(UserError, match=f"states of the {model} are NaN or infinite on held-out tokens"):
        fit_pair(moments_of(student, teacher), moments_of(**broken), [2], [0.0])
