"""Trained maps of hidden states: gradients in closed form, and equal initial matrices on all ranks."""

import pytest
import torch

from megatron_oprd.config import RepresentationConfig, StateMapConfig
from megatron_oprd.models import state_map
from megatron_oprd.models.state_map import MlpMap, make_maps

CPU = torch.device("cpu")


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_the_gradients_of_an_mlp_are_those_of_autograd(rows, monkeypatch):
    monkeypatch.setattr(state_map, "CHUNK_ROWS", 3)
    torch.manual_seed(0)
    first, second = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((12, 5), (4, 12)))
    states = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(rows, 4, dtype=torch.float64)
    expected = torch.nn.functional.gelu(states @ first.T) @ second.T
    of_states, of_first, of_second = torch.autograd.grad((expected * gradient).sum(), (states, first, second))
    mapped = MlpMap(first.detach(), second.detach())
    torch.testing.assert_close(mapped(states.detach()), expected.detach(), rtol=1e-13, atol=1e-13)
    for repeat in (1, 2):
        torch.testing.assert_close(mapped.pull_back(gradient, states.detach()), of_states, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mapped.gradients["first"], repeat * of_first, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mapped.gradients["second"], repeat * of_second, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "shapes"), [("linear", [(6, 4)]), ("mlp", [(12, 4), (6, 12)])])
def test_the_first_matrices_of_a_layer_do_not_depend_on_the_other_layers(kind, shapes):
    config = StateMapConfig(kind=kind, hidden_multiple=3)
    all_layers, one = make_maps(config, (1, 2), (4, 6), 7, CPU), make_maps(config, (2,), (4, 6), 7, CPU)
    assert [tuple(matrix.shape) for matrix in one[2].parameters.values()] == shapes
    for name, matrix in one[2].parameters.items():
        assert torch.equal(matrix, all_layers[2].parameters[name])
        assert not torch.equal(matrix, all_layers[1].parameters[name])
        bound = matrix.shape[1] ** -0.5
        assert matrix.abs().max() <= bound and matrix.abs().mean() == pytest.approx(bound / 2, rel=0.4)


def test_only_a_map_changes_the_default_of_normalize():
    for values, normalize in (({}, "none"), ({"kind": "none"}, "none"), ({"kind": "mlp"}, "l2")):
        assert RepresentationConfig.model_validate({"map": values}).normalize == normalize
    with pytest.raises(ValueError, match="both map the student's hidden states"):
        RepresentationConfig.model_validate({"map": {"kind": "linear"}, "bridge": "folder"})
