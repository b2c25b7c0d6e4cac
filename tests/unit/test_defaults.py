"""Defaults that fit the machine, the first step, small gradients and the student's files."""

import pytest
import torch

from megatron_oprd.checkpoint.hf_export import written_dtype
from megatron_oprd.config import OptimizerConfig, load_config
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.setup import with_dtype
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.training import student
from megatron_oprd.training.optimizer_arguments import optimizer_arguments
from tests.helpers.runs import replay_run


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's default")
def test_the_default_dtype_of_a_cpu_is_fp32_unless_a_setting_needs_bf16(tmp_path):
    arguments = [*replay_run(tmp_path, 1), "precision.dtype=auto"]
    for setting, dtype in (
        ("train.seed=0", "fp32"),
        ("precision.fp8=hybrid", "bf16"),
        ("precision.dtype=bf16", "bf16"),
    ):
        assert with_dtype(load_config(None, [*arguments, setting])).precision.dtype == dtype


def test_warm_up_begins_above_zero_and_ends_at_the_peak():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = OptimizerConfig(lr=1.0, warmup_fraction=0.1)
    scheduler, rates = student._scheduler(optimizer, config, 40), []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(increment=1)
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_default_epsilon_does_not_shorten_the_steps_of_small_gradients():
    arguments = optimizer_arguments(OptimizerConfig(), bf16=False, distributed=False)
    parameter = torch.nn.Parameter(torch.zeros(1))
    adam = torch.optim.AdamW([parameter], lr=1.0, eps=arguments["adam_eps"], weight_decay=0.0)
    parameter.grad = torch.full((1,), 2e-4 / 127e6**0.5)  # one element of a gradient of norm 2e-4 over 127 M parameters
    adam.step()
    assert parameter.item() == pytest.approx(-1.0, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_export_has_the_dtype_that_the_student_came_in(dtype, tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1).to(dtype), tmp_path / "student")
    assert written_dtype(read_model_spec(folder)) == dtype
