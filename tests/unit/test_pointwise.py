"""Norm, rotary embedding and SwiGLU have the bits of transformers' modules, gradients too, and few operators."""

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, rotate_half

from megatron_oprd.models.norm import RMSNorm
from megatron_oprd.models.rotary import rotate, signed
from megatron_oprd.models.swiglu import SwiGLU

DTYPES = (torch.float32, torch.bfloat16)
NO_KERNEL = ("view", "split", "slice", "detach", "expand", "alias", "promote_types", "unsqueeze", "empty")


class Operators(TorchDispatchMode):
    """Counts the operators that compute."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not any(part in name for part in NO_KERNEL):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def draw(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(function, states, upstream):
    """Return the output, the gradient of the states and the number of operators."""
    states = states.clone().requires_grad_()
    with Operators() as operators:
        output = function(states)
        output.backward(upstream)
    return output.detach(), states.grad, len(operators.names)


def rotate_in_transformers(states, cos, sin):
    width = cos.shape[-1]
    rotated, rest = states[..., :width], states[..., width:]
    return torch.cat((rotated * cos + rotate_half(rotated) * sin, rest), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 12])
def test_rotation_has_the_bits_of_transformers(dtype, width):
    angles = draw(7, 1, width // 2, dtype=torch.float32)
    cos, sin = (torch.cat((values, values), dim=-1).to(dtype) for values in (angles.cos(), angles.sin()))
    upstream = draw(7, 4, 16, dtype=dtype, seed=1)
    signed_sin = signed(sin)
    # Queries are a part of the projections, so they are not contiguous.
    projections = draw(7, 4, 32, dtype=dtype)
    output, gradient, operators = run(lambda x: rotate(x[..., :16], cos, signed_sin), projections, upstream)
    expected, of_expected, more = run(lambda x: rotate_in_transformers(x[..., :16], cos, sin), projections, upstream)
    assert torch.equal(output, expected) and torch.equal(gradient, of_expected)
    assert operators < more


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_has_the_bits_of_transformers(dtype):
    config = TransformerConfig(num_layers=1, hidden_size=64, num_attention_heads=4, params_dtype=dtype)
    own, theirs = RMSNorm(config, 64, eps=1e-5), Qwen2RMSNorm(64, eps=1e-5).to(dtype)
    for norm in (own, theirs):
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(2))
    states, upstream = draw(9, 1, 64, dtype=dtype), draw(9, 1, 64, dtype=dtype, seed=1)
    output, gradient, operators = run(own, states, upstream)
    expected, of_expected, more = run(theirs, states, upstream)
    assert torch.equal(output, expected) and torch.equal(gradient, of_expected)
    assert torch.equal(own.weight.grad, theirs.weight.grad)
    assert operators <= more


@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_has_the_bits_of_autograd_and_stores_its_input_alone(dtype):
    states, upstream = draw(9, 1, 64, dtype=dtype), draw(9, 1, 32, dtype=dtype, seed=1)

    def in_megatron(gate_and_up):
        gate, up = gate_and_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * (up + 0.0)

    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        output, gradient, operators = run(SwiGLU(None), states, upstream)
    expected, of_expected, more = run(in_megatron, states, upstream)
    assert torch.equal(output, expected) and torch.equal(gradient, of_expected)
    assert operators <= more
    assert stored == [states.numel()]
