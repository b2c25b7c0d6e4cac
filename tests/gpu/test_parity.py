"""Transformer Engine's modules in bf16 beside our own and beside Hugging Face's model in float32.

bf16 rounds either way: how far our own modules are from float32 is what Transformer Engine's are held to.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_oprd.models.precision import PLAIN
from tests.gpu.models import LENGTHS, TE, cosine, gradients, relative, run, save_model, sequences

BF16_ROUNDING = 3e-2


@pytest.fixture(scope="module", params=["Qwen2", "Qwen3"])
def folder(request, tmp_path_factory):
    """Biases on query, key and value, or norms on query and key; both with grouped queries."""
    return save_model(tmp_path_factory.mktemp("parity") / "model", request.param)


@torch.no_grad()
def test_logits_and_states_equal_hugging_face(folder, gpu):
    rows = sequences(384)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(gpu.device).eval()
    of_te, of_own = (run(gpu.load(folder, precision).eval(), rows, gpu.device) for precision in (TE, PLAIN))
    start = 0
    for row in rows:
        expected = hf(row[None].to(gpu.device), output_hidden_states=True)
        part = slice(start, start + len(row))
        wanted = {"logits": expected.logits[0], **{n: expected.hidden_states[n][0] for n in range(1, 5)}}
        for name, value in wanted.items():
            found, own = (
                (logits[:, :384] if name == "logits" else states[name])[part] for logits, states in (of_te, of_own)
            )
            error = relative(found, value)
            assert error < BF16_ROUNDING, (name, len(row))
            assert error < 2 * relative(own, value) + 2e-3, (name, len(row))
        start += len(row)


@torch.no_grad()
def test_packed_sequences_do_not_attend_to_each_other(folder, gpu):
    rows, stage = sequences(384), gpu.load(folder, TE).eval()
    packed = run(stage, rows, gpu.device)[0].split(LENGTHS)
    for row, logits in zip(rows, packed, strict=True):
        assert relative(logits, run(stage, [row], gpu.device)[0]) < BF16_ROUNDING / 2


def test_gradients_have_the_direction_of_our_own_modules(folder, gpu):
    rows = sequences(384)
    exact = gradients(gpu.load(folder, PLAIN, torch.float32), rows, gpu.device)
    te, own = (gradients(gpu.load(folder, precision), rows, gpu.device) for precision in (TE, PLAIN))
    assert te.keys() == own.keys() == exact.keys()
    for name, gradient in exact.items():
        least = min(0.999, cosine(own[name], gradient)) - 5e-3
        assert cosine(te[name], gradient) > least, name
        assert abs(te[name].norm() / gradient.norm() - 1) < BF16_ROUNDING, name
