"""The multipliers of loss.schedule, and the schedules that are refused."""

from pathlib import Path

import pytest
import yaml

from megatron_oprd.config import LossConfig
from megatron_oprd.launch.earlier_run import check_schedule
from megatron_oprd.models.layer_plan import make_plan
from megatron_oprd.testing.replayed_run import make_config
from megatron_oprd.types import UserError
from tests.helpers.specs import tiny_spec

CROSSFADE = {"representation": [[0, 1.0], [10, 0.0]], "output": [[0, 0.0], [10, 1.0]]}


def loss(schedule, **output):
    return LossConfig.model_validate({"output": {"objective": "full_kl", **output}, "schedule": schedule})


def test_multipliers_are_straight_between_the_points_and_constant_outside():
    schedule = loss(CROSSFADE).schedule
    for step in range(30):
        expected = max(0.0, 1 - step / 10), min(1.0, step / 10)
        assert schedule.multipliers(step) == pytest.approx(expected, abs=1e-15)
    assert loss({"output": [[5, 0.5], [7, 2.5]]}).schedule.multipliers(6) == (1.0, 1.5)
    assert loss({"output": [[5, 0.5], [7, 2.5]]}).schedule.multipliers(0) == (1.0, 0.5)


def test_the_loss_of_a_step_has_multiplied_weights_and_lacks_a_part_with_multiplier_zero():
    of_run = loss(CROSSFADE, weight=2.0)
    first, middle, last = of_run.at(0), of_run.at(4), of_run.at(10)
    assert first.reads_layers and not first.reads_output
    assert (middle.representation.weight, middle.output.weight) == (0.6, 0.8)
    assert last.reads_output and not last.reads_layers and last.output.weight == 2.0
    assert of_run.reads_layers and of_run.reads_output


def test_without_a_schedule_the_loss_of_a_step_is_the_loss_of_the_run():
    assert (constant := LossConfig()).at(3) is constant


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"output": [[5, 1.0], [5, 0.0]]}, r"output=\[\[5,1.0\],\[5,0.0\]\]: steps must rise"),
        ({"output": [[-1, 1.0]]}, "steps must rise, from 0 on"),
        ({"representation": [[0, -0.5]]}, "below 0"),
        ({"representation": [[0, 0.0], [4, 0.0]]}, "is 0 at every step"),
        ({"representation": []}, "at least 1 item"),
        ({"representation": [[0, 1.0], [4, 0.0]], "output": [[0, 1.0], [3, 0.0], [5, 0.0]]}, "learn at step 4"),
        ({"representation": [[3, 0.0], [4, 1.0]], "output": [[0, 0.0], [4, 1.0]]}, "learn at step 0"),
    ],
)
def test_a_schedule_that_cannot_be_meant_is_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        loss(schedule)


def test_a_schedule_may_not_turn_off_the_only_part():
    with pytest.raises(ValueError, match="nothing to learn at step 4"):
        LossConfig.model_validate({"schedule": {"representation": [[0, 1.0], [4, 0.0]]}})


def test_a_step_without_distributions_runs_the_layers_up_to_the_highest_compared_one():
    of_run = LossConfig.model_validate(
        {"representation": {"layers": [2]}, "output": {"objective": "full_kl"}, "schedule": CROSSFADE}
    )
    plan = make_plan(of_run, tiny_spec(num_layers=4), tiny_spec(num_layers=6))
    first, last = plan.for_loss(of_run.at(0)), plan.for_loss(of_run.at(10))
    assert (first.student_last_layer, first.teacher_last_layer, first.output) == (2, 3, False)
    assert (last.student_last_layer, last.teacher_last_layer, last.pairs) == (4, 6, ())
    assert first.teacher_stages == last.teacher_stages == plan.teacher_stages == (6,)


def test_a_run_continues_only_with_a_schedule_that_agrees_up_to_its_step(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"loss": {"schedule": CROSSFADE}}))

    def check(schedule, done):
        config = make_config(Path("student"), Path("teacher"), "loss.output.objective=full_kl")
        check_schedule(file, config.model_copy(update={"loss": loss(schedule)}), done)

    longer = {"representation": [[0, 1.0], [5, 0.5], [8, 0.5]], "output": [[0, 0.0], [5, 0.5], [8, 0.5]]}
    check(CROSSFADE, 100)
    check(longer, 6)
    with pytest.raises(UserError, match=r"multipliers \[0.4, 0.6\] after 6 updates; loss.schedule has \[0.5, 0.5\]"):
        check(longer, 7)
    with pytest.raises(UserError, match="agrees up to step 1"):
        check(None, 1)
    check(None, 0)
    file.write_text("loss: {schedule: [1]}")  # edited by hand: no schedule
    check(None, 5)
