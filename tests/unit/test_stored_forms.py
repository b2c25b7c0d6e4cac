"""Fused experts and FP8 weights are read as transformers reads them."""

import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers import quantizer_finegrained_fp8

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.experts import fuse_experts
from megatron_oprd.hf.fp8 import dequantize, scale_shape
from megatron_oprd.hf.names import entries, hf_shapes
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.compare import open_hf_model
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.configs import assert_refused, edited

GATE_UP, DOWN = (f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
SINGLE = "model.layers.0.mlp.experts.1.gate_proj.weight"


def both_forms(folder, **overrides):
    """Save a mixture of experts in both forms and return the folders, fused first."""
    model = random_hf_model("Qwen3Moe", num_hidden_layers=2, **overrides)
    return save(model, folder / "fused", save_original_format=False), save(model, folder / "single")


def edit_tensors(folder, change):
    """Change the dictionary of tensors of a folder in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"mlp_only_layers": [], "num_experts": 3}, {"hidden_size": 80, "moe_intermediate_size": 40}],
    ids=["one dense layer", "three experts", "square"],
)
def test_fused_experts_are_the_experts_that_transformers_saves_one_by_one(overrides, tmp_path):
    fused, single = both_forms(tmp_path, **overrides)
    reader, spec, expected = HFReader(fused), read_model_spec(fused), load_file(single / "model.safetensors")
    reader.check(spec)
    assert (spec.fused_experts, read_model_spec(single).fused_experts) == (True, False)
    assert reader.names() == sorted(expected)
    assert reader.dtype() == torch.float32
    for name, tensor in expected.items():
        assert torch.equal(reader.read(name), tensor), name
        assert torch.equal(reader.read_rows(name, 3, 7), tensor[3:7]), name
    back = dict(fuse_experts(((n, reader.read(n)) for e in entries(spec) for n in e.hf), spec))
    written = load_file(fused / "model.safetensors")
    assert back.keys() == written.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in written.items())


EXPERT_BREAKAGES = {
    "two forms": (lambda t: t.update({SINGLE: torch.zeros(40, 64)}), f"two forms, {DOWN} and {SINGLE}; save the model"),
    "half of a layer": (lambda t: t.pop(DOWN), f"holds {GATE_UP}, but not {DOWN}"),
    "a missing layer": (lambda t: (t.pop(DOWN), t.pop(GATE_UP)), f"misses 2 tensors, the first is {DOWN}"),
    "transposed": (lambda t: t.update({DOWN: t[DOWN].mT}), rf"{DOWN} has shape \[4, 40, 64\], .* asks for \[4, 64, 40"),
    "too few experts": (lambda t: t.update({GATE_UP: t[GATE_UP][:3]}), rf"{GATE_UP} has shape \[3, 80, 64\]"),
    "without a dimension": (lambda t: t.update({GATE_UP: t[GATE_UP][0]}), r"not \[experts, rows, columns\]"),
    "a dense layer": (
        lambda t: t.update({n.replace("s.0", "s.1"): t[n].clone() for n in (GATE_UP, DOWN)}),
        "unknown 2 tensors, the first is model.layers.1.mlp.experts.down_proj",
    ),
}


@pytest.mark.parametrize("name", EXPERT_BREAKAGES)
def test_mixed_or_incomplete_fused_experts_are_refused(name, tmp_path):
    change, message = EXPERT_BREAKAGES[name]
    folder = save(random_hf_model("Qwen3Moe", num_hidden_layers=3), tmp_path / "hf", save_original_format=False)
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        HFReader(folder).check(read_model_spec(folder))


def quantise(folder, block, skipped=(), scale_dtype=torch.bfloat16):
    """Store the linear layers of a folder in FP8 as Qwen does: all but the LM head, routers and `skipped`."""

    def change(tensors):
        for name in [n for n, t in tensors.items() if t.ndim > 1]:
            if any(part in name for part in ("lm_head", "embed_tokens", "mlp.gate.", *skipped)):
                continue
            weight = tensors[name].float()
            scales = torch.rand(scale_shape(tuple(weight.shape), block), dtype=torch.float32) * 0.02 + 0.001
            tensors[name] = (weight * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scales.to(scale_dtype)

    torch.manual_seed(3)
    edit_tensors(folder, change)
    edit_config(
        folder,
        quantization_config={
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": ["lm_head", *skipped],
            "quant_method": "fp8",
            "weight_block_size": list(block),
        },
    )
    return folder


FP8_MODELS = {
    "dense": ("Qwen3", {"block": (16, 8)}),
    "float32 scales, some layers in bfloat16": (
        "Llama",
        {"block": (8, 8), "scale_dtype": torch.float32, "skipped": ("model.layers.0.mlp.down_proj",)},
    ),
    "experts": ("Qwen3Moe", {"block": (8, 8)}),
    "blocks that span fused parts": ("Phi3", {"block": (16, 4)}),
}


@pytest.mark.parametrize("name", FP8_MODELS)
def test_fp8_weights_are_dequantised_as_transformers_does(name, tmp_path, monkeypatch):
    family, options = FP8_MODELS[name]
    folder = save(random_hf_model(family, num_hidden_layers=2).bfloat16(), tmp_path / "hf")
    quantise(folder, **options)
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: False)
    without_accelerate = open_hf_model(folder, torch.bfloat16, torch.bfloat16).state_dict()
    # transformers needs accelerate only to place weights on devices.
    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert without_accelerate.keys() == model.state_dict().keys()
    assert all(torch.equal(without_accelerate[name], tensor) for name, tensor in model.state_dict().items())
    expected = load_file(save(model, tmp_path / "expected") / "model.safetensors")
    reader, spec = HFReader(folder), read_model_spec(folder)
    reader.check(spec)
    assert reader.quantized
    assert reader.dtype() == torch.bfloat16
    assert "quantization_config" not in spec.hf_config
    assert reader.names() == sorted(expected) == sorted(hf_shapes(spec))
    for tensor_name, tensor in expected.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(reader.read(tensor_name).bfloat16(), tensor), tensor_name
        assert torch.equal(reader.read_rows(tensor_name, 3, 21).bfloat16(), tensor[3:21]), tensor_name


@pytest.mark.parametrize("block", [(8, 8), (16, 4), (20, 16)])
def test_fused_experts_in_fp8_are_dequantised(block, tmp_path):
    folder = save(
        random_hf_model("Qwen3Moe", num_hidden_layers=1, mlp_only_layers=[]), tmp_path, save_original_format=False
    )
    quantise(folder, block)
    stored, reader = load_file(folder / "model.safetensors"), HFReader(folder)
    reader.check(read_model_spec(folder))
    full = {n: stored[n].float() * expand(stored[n + "_scale_inv"], block, stored[n].shape) for n in (GATE_UP, DOWN)}
    assert torch.equal(reader.read(SINGLE), full[GATE_UP][1, :40])
    assert torch.equal(reader.read(SINGLE.replace("gate", "up")), full[GATE_UP][1, 40:])
    assert torch.equal(reader.read(SINGLE.replace("gate", "down")), full[DOWN][1])


def expand(scales, block, shape):
    """Return the scale of each element: DeepSeek's rule, with smaller last blocks."""
    repeated = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return repeated[..., : shape[-2], : shape[-1]]


@pytest.mark.parametrize(("rows", "columns", "block"), [(256, 384, (128, 128)), (300, 130, (128, 128)), (5, 7, (2, 3))])
def test_any_rows_of_an_fp8_weight_have_their_own_scales(rows, columns, block):
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_shape((rows, columns), block))
    expected = weight.float() * expand(scales, block, weight.shape)
    if rows % block[0] == 0:
        torch.testing.assert_close(Fp8Dequantize(None)._dequantize_one(weight, scales), expected, rtol=0, atol=0)
    for size in (1, 2, 3):
        bounds = [rows * rank // size for rank in range(size + 1)]
        parts = [dequantize(weight[a:b], scales, block, a) for a, b in itertools.pairwise(bounds)]
        assert torch.equal(torch.cat(parts), expected)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"bits": 4}, "quant_method None is not supported"),
        *(({"quant_method": m}, f"quant_method '{m}' is not supported; use the model without quantisation") for m in
          ("gptq", "awq", "bitsandbytes", "compressed-tensors", "fbgemm_fp8")),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size=None, not two sizes; use"),
        (FP8 | {"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]"),
        (FP8 | {"activation_scheme": "static"}, "activation_scheme='static', only 'dynamic'"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0', only 'float'"),
        ([8], r"quantization_config=\[8\] must be a dict"),
    ],
)  # fmt: skip
def test_another_quantisation_is_refused_by_name(config, message, tmp_path):
    assert_refused(edited("Qwen3", {"quantization_config": config}, tmp_path, num_hidden_layers=1), message)


WEIGHT = "model.layers.0.mlp.up_proj.weight"
SCALES = WEIGHT + "_scale_inv"
FP8_BREAKAGES = {
    "no scales": (lambda t: t.pop(SCALES), f"{WEIGHT} is stored as F8_E4M3 without scales"),
    "scales alone": (lambda t: t.pop(WEIGHT), f"misses 1 tensors, the first is {WEIGHT}"),
    "scales of a bfloat16 weight": (lambda t: t.update({WEIGHT: t[WEIGHT].bfloat16()}), f"{WEIGHT} has scales, but is"),
    "another grid": (lambda t: t.update({SCALES: t[SCALES][1:]}), rf"{SCALES} has shape \[13, 8\], .* \[14, 8\]"),
    "scales as integers": (lambda t: t.update({SCALES: t[SCALES].to(torch.uint8)}), f"{SCALES} is stored as U8"),
    "scales of nothing": (lambda t: t.update({"a_scale_inv": t[SCALES].clone()}), "holds a_scale_inv, but not a"),
}


@pytest.mark.parametrize("name", FP8_BREAKAGES)
def test_incomplete_fp8_weights_are_refused(name, tmp_path):
    change, message = FP8_BREAKAGES[name]
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1).bfloat16(), tmp_path)
    quantise(folder, (8, 8))
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=message):
        HFReader(folder).check(read_model_spec(folder))


def test_fp8_weights_without_their_config_are_refused(tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1).bfloat16(), tmp_path)
    quantise(folder, (8, 8))
    edit_config(folder, quantization_config=None)
    with pytest.raises(UserError, match=r"holds unknown 7 tensors, the first is .*_scale_inv"):
        HFReader(folder).check(read_model_spec(folder))
