"""with_tap carries a tap beside the caller's own packing, and the layer of Megatron-Core receives that packing."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_oprd.models.layer import TappedTransformerLayer, tapped_layer_spec
from megatron_oprd.models.tap_params import with_tap


class Layer(TappedTransformerLayer):
    """A layer number 2 without modules."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.layer_number = 2


@pytest.fixture
def received(monkeypatch):
    """Replace the forward pass of Megatron-Core's layer by one that records its packed_seq_params and adds 1."""
    calls = []

    def forward(self, hidden_states, **kwargs):
        calls.append(kwargs["packed_seq_params"])
        return hidden_states + 1, None

    monkeypatch.setattr(TransformerLayer, "forward", forward)
    return calls


def double(layer, hidden_states):
    assert layer == 2
    return 2 * hidden_states


PACKING = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor([0, 3, 5]), max_seqlen_q=3, max_seqlen_kv=3)


@pytest.mark.parametrize("packing", [PACKING, None])
def test_the_layer_receives_the_callers_packing_and_the_tap_its_output(packing, received):
    params = with_tap(double, PACKING) if packing else with_tap(double, sequence_length=5)
    output, _ = Layer().forward(torch.ones(5, 1, 4), packed_seq_params=params)
    assert received == [packing] and torch.equal(output, torch.full((5, 1, 4), 4.0))


@pytest.mark.parametrize("packing", [PACKING, None])
def test_without_a_tap_the_layer_is_megatron_cores(packing, received):
    output, _ = Layer().forward(torch.ones(5, 1, 4), packed_seq_params=packing)
    assert received == [packing] and torch.equal(output, torch.full((5, 1, 4), 2.0))


def test_the_model_sees_the_lengths_of_the_packing():
    params = with_tap(double, PACKING)
    assert (params.qkv_format, params.max_seqlen_q, params.cu_seqlens_q) == ("thd", 3, PACKING.cu_seqlens_q)
    assert with_tap(double, sequence_length=7).max_seqlen_kv == 7


@pytest.mark.parametrize("arguments", [{}, {"packed_seq_params": PACKING, "sequence_length": 5}])
def test_packing_and_sequence_length_exclude_each_other(arguments):
    with pytest.raises(ValueError, match=r"either packed_seq_params .* or sequence_length"):
        with_tap(double, **arguments)


def test_a_layer_of_another_class_is_refused():
    with pytest.raises(ValueError, match="must be Megatron-Core's TransformerLayer"):
        tapped_layer_spec(ModuleSpec(TappedTransformerLayer))
