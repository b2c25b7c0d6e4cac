"""The mathematics of hidden flow: closed-form gradients, identical models, invariances, and the compared states."""

import pytest
import torch

from megatron_oprd.config import FlowConfig, LossConfig, ParallelConfig
from megatron_oprd.losses.flow import (
    Cosines,
    cosine_error,
    cosine_gradients,
    direction_error,
    direction_gradient,
    directions,
    spread_positions,
)
from megatron_oprd.models.layer_plan import FlowRole, make_plan
from megatron_oprd.types import FlowKey, UserError
from tests.helpers.specs import tiny_spec


def states(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_closed_form_gradients_equal_autograd():
    first, second = states(2, 9, 16).requires_grad_(), states(2, 9, 16).requires_grad_()
    of_teacher = [directions(states(2, 9, 16)) for _ in range(2)]
    student = [directions(one) for one in (first, second)]
    cosines = [Cosines(*(one.units for one in pair)) for pair in (student, of_teacher)]
    expected = torch.autograd.grad(
        cosine_error(*cosines).sum() + direction_error(student[0], of_teacher[0]).sum(), (first, second)
    )
    with torch.no_grad():
        of_first, of_second = cosine_gradients(*cosines)
        of_first = of_first + direction_gradient(student[0], of_teacher[0])
        actual = student[0].pull_back(of_first), student[1].pull_back(of_second)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_identical_states_give_exactly_zero():
    one = torch.randn(2, 9, 16)
    student, teacher = directions(one), directions(one.clone())
    cosines = Cosines(student.units, student.units), Cosines(teacher.units, teacher.units)
    assert direction_error(student, teacher).eq(0).all() and cosine_error(*cosines).eq(0).all()
    gradients = (direction_gradient(student, teacher), *cosine_gradients(*cosines))
    assert all(student.pull_back(one).eq(0).all() for one in gradients)


def test_an_offset_changes_nothing_and_angles_do_not_depend_on_a_rotation_or_the_width():
    one, rotation = states(1, 9, 16), torch.linalg.qr(states(16, 16))[0]
    plain, moved, turned = directions(one), directions(one + states(1, 1, 16)), directions(one @ rotation)
    torch.testing.assert_close(moved.units, plain.units, rtol=0, atol=1e-12)
    wide = Cosines(*[directions(states(1, 9, 40)).units] * 2)
    of_plain, of_turned = (cosine_error(Cosines(one.units, one.units), wide) for one in (plain, turned))
    torch.testing.assert_close(of_turned, of_plain, rtol=1e-12, atol=0)


def test_equal_states_have_no_direction_and_get_no_gradient():
    found = directions(torch.ones(1, 3, 4))
    assert found.units.eq(0).all() and found.pull_back(torch.ones(1, 2, 4)).eq(0).all()


def test_positions_reach_from_the_first_sampled_token_to_the_last():
    assert spread_positions([1] * 5, 128) == [0, 1, 2, 3, 4]
    assert spread_positions([0, *[1] * 10, 0], 4) == [1, 4, 7, 10]
    assert spread_positions([1] * 1000, 3) == [0, 499, 999]
    assert spread_positions([0, 1, 0], 4) == spread_positions([], 4) == []


def plan(pipeline=1, virtual=None, layers="all", adjacent=0.5, depth=4):
    loss = LossConfig(flow=FlowConfig(weight=1.0, layers=layers, adjacent=adjacent))
    parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=virtual)
    return make_plan(loss, tiny_spec(num_layers=depth), tiny_spec(num_layers=depth), parallel)


def test_a_pair_of_layers_over_a_stage_boundary_belongs_to_the_later_stage():
    inner, top = FlowRole(own=True, below=True, above=True), FlowRole(own=True, below=True, above=False)
    assert plan().flow_roles((0,)) == {1: FlowRole(True, False, True), 2: inner, 3: inner, 4: top}
    two = plan(pipeline=2)
    assert two.flow_roles((0,)) == {1: FlowRole(True, False, True), 2: top}
    assert two.flow_roles((1,)) == {2: FlowRole(False, False, True), 3: inner, 4: top}
    assert two.readers((1,)).keys() >= {FlowKey(2), FlowKey(3), FlowKey(4)} and two.flow_straddles and two.aligned
    chunks = plan(pipeline=2, virtual=2)
    assert chunks.flow_roles((0, 2)) == {1: FlowRole(True, False, False), 2: FlowRole(False, False, True), 3: top}
    assert not plan(pipeline=2, adjacent=0.0).flow_straddles
    assert plan(layers=[1, 2, 4]).flow_pairs == {2}


def test_flow_that_compares_nothing_is_refused():
    with pytest.raises(UserError, match=r"loss.flow.layers=even has none; use layers all, or adjacent=0"):
        plan(layers="even")
    with pytest.raises(UserError, match=r"loss.flow.layers: student layer 9 does not exist"):
        plan(layers=[9])
    with pytest.raises(ValueError, match="are all 0; set one above 0"):
        FlowConfig(weight=1.0, direction=0.0, geometry=0.0, adjacent=0.0)
    loss = LossConfig(flow=FlowConfig(weight=1.0)).model_copy(
        update={"representation": LossConfig().representation.model_copy(update={"weight": 0.0})}
    )
    with pytest.raises(UserError, match=r"hidden_size 48; use loss.flow.direction=0"):
        make_plan(loss, tiny_spec(hidden_size=64), tiny_spec(hidden_size=48))
