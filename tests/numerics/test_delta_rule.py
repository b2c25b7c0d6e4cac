"""The chunked gated delta rule and the convolution of packed sequences equal loops over single tokens."""

import itertools

import pytest
import torch

from megatron_oprd.models import delta_rule
from megatron_oprd.models.delta_rule import causal_convolution, delta_rule_step, gated_delta_rule, plan_chunks

LENGTHS = (2, 64, 63, 130, 7, 65, 200)
BOUNDS = (0, *itertools.accumulate(LENGTHS))


def random_inputs(dtype=torch.float64):
    """Return query, key, value, decay and beta for two key heads with three value heads each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(BOUNDS[-1], *shape, generator=generator, dtype=torch.float64).to(dtype)

    return normal(2, 8), normal(2, 8), normal(6, 5), -normal(6).abs() * 0.1, normal(6).sigmoid()


def by_single_tokens(query, key, value, decay, beta):
    """Return outputs and last states from the equations in `models/delta_rule.py`, one token after the other."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = ((x.repeat_interleave(3, dim=1)) for x in (query / 8**0.5, key))
    outputs, states = [], []
    for start, end in itertools.pairwise(BOUNDS):
        state = torch.zeros(6, 8, 5, dtype=value.dtype)
        for t in range(start, end):
            state = decay[t].exp()[:, None, None] * state
            correction = beta[t][:, None] * (value[t] - torch.einsum("hkv,hk->hv", state, key[t]))
            state = state + torch.einsum("hk,hv->hkv", key[t], correction)
            outputs.append(torch.einsum("hkv,hk->hv", state, query[t]))
        states.append(state)
    return torch.stack(outputs), torch.stack(states)


def test_chunks_equal_single_tokens_in_values_and_gradients():
    inputs = [x.requires_grad_() for x in random_inputs()]
    results = []
    for outputs, states in (
        gated_delta_rule(*inputs, plan_chunks(BOUNDS, torch.device("cpu"))),
        by_single_tokens(*inputs),
    ):
        loss = (outputs * torch.linspace(-1, 1, 5)).sin().sum() + states.square().sum()
        results.append((outputs, states, *torch.autograd.grad(loss, inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_each_row_goes_on_where_chunks_end(dtype):
    inputs = random_inputs(dtype)
    outputs, _ = gated_delta_rule(*inputs, plan_chunks(BOUNDS, torch.device("cpu")))
    kept = torch.tensor([token for start, end in itertools.pairwise(BOUNDS) for token in range(start, end - 1)])
    shorter = (0, *itertools.accumulate(length - 1 for length in LENGTHS))
    _, state = gated_delta_rule(*(x[kept] for x in inputs), plan_chunks(shorter, torch.device("cpu")))
    assert state.dtype == torch.float32
    last = torch.tensor(BOUNDS[1:]) - 1
    stepped = delta_rule_step(*(x[last] for x in inputs), state)
    torch.testing.assert_close(stepped, outputs[last], rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_the_convolution_begins_anew_in_each_sequence():
    inputs, weight = torch.randn(BOUNDS[-1], 6, dtype=torch.float64), torch.randn(6, 1, 4, dtype=torch.float64)
    actual = causal_convolution(inputs, weight, plan_chunks(BOUNDS, torch.device("cpu")))
    for start, end in itertools.pairwise(BOUNDS):
        for t in range(start, end):
            expected = sum(weight[:, 0, 3 - back] * inputs[t - back] for back in range(min(4, t - start + 1)))
            torch.testing.assert_close(actual[t], expected)


def test_no_token_of_another_sequence_changes_an_output(monkeypatch):
    def outputs_of_second(changed, bounds):
        inputs = [x[:40].clone() for x in random_inputs()]
        inputs[2][:20] += changed
        plan = plan_chunks(bounds, torch.device("cpu"))
        mixed = causal_convolution(inputs[2].flatten(1), torch.ones(30, 1, 4, dtype=torch.float64), plan)
        return gated_delta_rule(*inputs[:2], mixed.view(40, 6, 5), *inputs[3:], plan)[0][20:]

    assert torch.equal(outputs_of_second(0, (0, 20, 40)), outputs_of_second(1, (0, 20, 40)))
    assert not torch.equal(outputs_of_second(0, (0, 40)), outputs_of_second(1, (0, 40)))
    monkeypatch.setattr(delta_rule, "CHUNK", 16)
    assert torch.equal(outputs_of_second(0, (0, 20, 40)), outputs_of_second(1, (0, 20, 40)))
