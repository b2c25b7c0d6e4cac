"""Hybrid models of the demo: a Qwen3 with further layers of Gated DeltaNet."""

import torch

from examples.demo import hybrid
from examples.demo.make_pair import build_model, response_logits
from examples.demo.task import RESPONSE_LENGTH, encode, split_additions


def test_new_layers_without_output_leave_the_model_as_it_was(monkeypatch):
    monkeypatch.setattr(hybrid, "START_SCALE", 0.0)
    model, tokens = build_model(3), encode(split_additions(3).heldout[:20])
    grown = hybrid.with_delta_net(model, 1)
    assert grown.config.layer_types.count("linear_attention") == 2 and grown.config.num_hidden_layers == 6
    with torch.no_grad():
        expected, logits = (response_logits(each, tokens, RESPONSE_LENGTH) for each in (model, grown))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        monkeypatch.setattr(hybrid, "START_SCALE", 0.1)
        changed = response_logits(hybrid.with_delta_net(model, 1), tokens, RESPONSE_LENGTH)
    assert (changed - expected).abs().max() > 0.01, "the new layers must be able to add something"
