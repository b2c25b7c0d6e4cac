"""A teacher that follows the student: its limits are the frozen and the live teacher, and its weights a closed form."""

import dataclasses

import pytest
import torch

from megatron_oprd.checkpoint.saver import Saving
from megatron_oprd.checkpoint.training_state import load_checkpoint
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.launch.setup import read_setup
from megatron_oprd.rollout.engine import FinishedRollouts
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import make_config
from megatron_oprd.testing.update import measure_update
from megatron_oprd.train import one_step
from megatron_oprd.training.state import PendingStep, TrainState
from megatron_oprd.types import UserError
from tests.helpers.training import make_run

BOTH = ("loss.output.objective=full_kl", "loss.output.metrics_every=0")
SMALL_STEPS = ("optimizer.lr=1.0", "train.steps=3")
ADAMW = ("optimizer.name=adamw", "optimizer.lr=0.01", "optimizer.clip_grad=1.0", "train.steps=3")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    sizes = {"num_hidden_layers": 2}
    return tuple(save(random_hf_model("Qwen3", seed, **sizes), folder / str(seed)) for seed in (0, 1))


def weights(stage):
    return {name: one.detach().clone() for name, one in named_parameters(stage).items()}


def step(run, state=None):
    """Take a step on the rollouts of the first one, and return the state after it."""
    state, rollouts = state or TrainState(), FinishedRollouts(list(run.inputs.replayed))
    pending = PendingStep(state.step, state.prompts, rollouts)
    state, _, _ = one_step(run, dataclasses.replace(state, pending=pending))
    return state


def test_one_is_a_frozen_teacher_bit_for_bit(models):
    frozen, kept = (measure_update(make_run(*models, *BOTH, *ema), one_step) for ema in ((), ("teacher.ema=1.0",)))
    assert frozen.loss == kept.loss
    assert all(torch.equal(kept.gradients[name], gradient) for name, gradient in frozen.gradients.items())
    assert make_run(*models, "teacher.ema=1.0").student.average is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_zero_is_the_student_at_the_last_step(models, dtype):
    run = make_run(*models, *BOTH, *SMALL_STEPS, "teacher.ema=0.0", f"precision.dtype={dtype}")
    step(run)
    now = weights(run.student.stage)
    for name, parameter in weights(run.teachers[0].load()).items():
        assert torch.equal(parameter, now[name]), name
    assert torch.equal(run.heads.teachers[0], run.heads.student[: run.heads.rows])


@pytest.mark.parametrize("settings", [SMALL_STEPS, (*ADAMW, "precision.dtype=bf16")], ids=["fp32", "bf16"])
def test_weights_are_the_closed_form_of_the_average(models, settings):
    rate, count = 0.9, 3
    run = make_run(*models, *BOTH, *settings, f"teacher.ema={rate}")
    teacher = run.teachers[0].load()
    expected = {name: value.double() * rate**count for name, value in weights(teacher).items()}
    head = run.heads.teachers[0].double() * rate**count
    state = None
    for number in range(count):
        state = step(run, state)
        share = (1 - rate) * rate ** (count - 1 - number)
        for name in expected:
            parameter = named_parameters(run.student.stage)[name]
            master = getattr(parameter, "main_param", parameter).detach().view(parameter.shape)
            expected[name] += share * master.double()
        student = run.heads.student
        head += share * getattr(student, "main_param", student).detach().view(student.shape)[: len(head)].double()
    tolerance = 2**-8 if "precision.dtype=bf16" in settings else 1e-6
    averages = run.student.average.parameters
    for name, value in weights(teacher).items():
        torch.testing.assert_close(
            averages[name].values.view(value.shape).double(), expected[name], rtol=1e-6, atol=1e-7
        )
        torch.testing.assert_close(value.double(), expected[name], rtol=tolerance, atol=1e-7)
    torch.testing.assert_close(run.heads.teachers[0].double(), head, rtol=tolerance, atol=1e-7)


def test_a_resumed_run_continues_with_the_same_average(models, tmp_path):
    settings = (*BOTH, *ADAMW, "precision.dtype=bf16", "teacher.ema=0.9")
    run = make_run(*models, *settings)
    state = step(run)
    checkpoint = Saving(tmp_path, run.checkpoint_content, state, keep=1).finish()
    step(run, state)
    resumed = make_run(*models, *settings)
    state = load_checkpoint(checkpoint, resumed.checkpoint_content)
    step(resumed, state)
    actual = weights(resumed.student.stage)
    for name, value in weights(run.student.stage).items():
        assert torch.equal(actual[name], value), name
    for name, one in run.student.average.parameters.items():
        assert torch.equal(resumed.student.average.parameters[name].values, one.values), name
    assert torch.equal(resumed.heads.teachers[0], run.heads.teachers[0])
    frozen = make_run(*models, *settings, "teacher.ema=null")
    with pytest.raises(UserError, match=r"follows the student with ema 0.9, teacher.ema asks for a frozen teacher"):
        load_checkpoint(checkpoint, frozen.checkpoint_content)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("precision.teacher_fp8=weights",), "FP8 copies of weights are made once"),
        (("teachers_in_memory=one",), "loads the weights of the files again"),
        (("loss.representation.bridge=folder",), "which is fitted to a frozen teacher"),
        (("optimizer.precision_aware=true",), "has no float32 weights"),
        (("optimizer.cpu_offload=0.5",), "moves the float32 weights"),
        (("teacher.ema=1.5",), "less than or equal to 1"),
    ],
)
def test_settings_that_have_no_average_are_refused(models, settings, message):
    with pytest.raises(UserError, match=message):
        make_config(*models, "teacher.ema=0.9", *settings)


def test_a_teacher_of_another_shape_or_layout_is_refused(models, tmp_path):
    deep = save(random_hf_model("Qwen3", 3, num_hidden_layers=3), tmp_path / "deep")
    config = make_config(models[0], deep, "teacher.ema=0.9")
    with pytest.raises(UserError, match=r"has num_layers 3 instead of 2, and teacher.ema=0.9 averages the weights"):
        read_setup(config, config.named_teachers)
    config = make_config(
        *models, "teacher.ema=0.9", "parallel={tensor: 2, world_size: 2}", "teacher.parallel={tensor: 1}"
    )
    with pytest.raises(UserError, match=r"leave teacher.parallel out"):
        read_setup(config, config.named_teachers, dry_run=True)
