"""The FP8 product without Transformer Engine equals its definition, and a teacher's weights take one byte each."""

import pytest
import torch

from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import ModelPart, build_model
from megatron_oprd.models.scaled_linear import FP8, quantize_weights, scaled_product
from megatron_oprd.testing.models import random_hf_model, save

LARGEST = 448.0  # of E4M3


def by_definition(x, weight):
    """Scale both by max / 448, round to E4M3, multiply in float64 and scale back."""
    scales = [t.abs().max().float() / LARGEST for t in (x, weight)]
    rounded = [(t.float() / s).to(FP8).double() for t, s in zip((x, weight), scales, strict=True)]
    return rounded[0] @ rounded[1].t() * scales[0].double() * scales[1].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_equals_its_definition(dtype):
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(17, 64, generator=generator) * 5).to(dtype)
    weight = (torch.randn(32, 64, generator=generator) / 100).to(dtype)
    scale = weight.abs().max().float() / LARGEST
    result = scaled_product(x, (weight.float() / scale).to(FP8), scale)
    expected = by_definition(x, weight)
    assert result.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 4e-3  # of bf16's own rounding
    assert ((result.double() - expected).norm() / expected.norm()) < tolerance
    exact = x.double() @ weight.double().t()
    assert 1e-3 < (result.double() - exact).norm() / exact.norm() < 0.06


def test_empty_and_zero_inputs_are_accepted():
    weight, scale = torch.ones(16, 32).to(FP8), torch.tensor(1.0)
    assert scaled_product(torch.empty(0, 32), weight, scale).shape == (0, 16)
    assert scaled_product(torch.zeros(3, 32), weight, scale).tolist() == torch.zeros(3, 16).tolist()


@pytest.mark.parametrize(("family", "kept"), [("Qwen3", (1, 2)), ("Qwen3Moe", (0, 0))])
def test_weights_of_the_middle_layers_take_one_byte_each(family, kept, topology, tmp_path):
    sizes = {"moe_intermediate_size": 48} if family == "Qwen3Moe" else {}
    folder = save(random_hf_model(family, **sizes), tmp_path / "model")
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, torch.float32, ModelPart(lm_head=False))
    load_weights(stage, folder, spec, topology)
    before = {name: parameter.detach().clone() for name, parameter in stage[0].named_parameters()}
    assert quantize_weights(stage, kept) == spec.num_layers - sum(kept)
    for name, parameter in stage[0].named_parameters():
        turned = ".linear_" in name and name.endswith("weight") and kept[0] <= block(name) < spec.num_layers - kept[1]
        assert parameter.element_size() == (1 if turned else 4), name
        assert turned or torch.equal(parameter, before[name])


def block(name):
    return int(name.split(".")[2])
