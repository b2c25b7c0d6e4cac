"""Weights that are NaN or infinite are refused with their name, whatever form the files have."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oprd.checkpoint.megatron_format import save_model
from megatron_oprd.checkpoint.weights import load_weights
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.models.build import build_model
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.types import UserError

EXPERT = "model.layers.0.mlp.experts.2.up_proj.weight"
CASES = {
    "NaN in a norm": ("Llama", "model.norm.weight", torch.nan, torch.float32),
    "infinity in fused rows": ("Phi3", "model.layers.1.self_attn.qkv_proj.weight", -torch.inf, torch.bfloat16),
    "NaN in an expert": ("Qwen3Moe", EXPERT, torch.nan, torch.float32),
    "a weight that float16 cannot hold": ("Qwen3", "lm_head.weight", 1e5, torch.float16),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["hf", "megatron"])
def test_weights_that_are_not_finite_are_refused(case, form, topology, tmp_path):
    family, name, value, dtype = CASES[case]
    folder = save(random_hf_model(family, num_hidden_layers=2), tmp_path / "hf", save_original_format=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[3] = value
    if form == "hf":
        save_file(tensors, file, metadata={"format": "pt"})
    spec = read_model_spec(folder)
    model = build_model(spec, topology, dtype if form == "hf" else torch.float32)
    if form == "megatron":
        load_weights(model, folder, spec, topology)
        fill(model, value)
        folder, name = tmp_path / "megatron", "model.embed_tokens.weight"
        save_model(model, folder, spec, topology, tmp_path / "hf")
        model = build_model(spec, topology, dtype)
    with pytest.raises(UserError, match=r"NaN or infinite in .*; copy the folder again, or use a checkpoint") as caught:
        load_weights(model, folder, spec, topology)
    assert f"{folder}: 1 of " in str(caught.value) and name in str(caught.value)


def fill(model, value):
    with torch.no_grad():
        next(model.parameters()).view(-1)[3] = value


def test_large_finite_weights_are_loaded(topology, tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "hf")
    file = folder / "model.safetensors"
    save_file(load_file(file) | {"model.norm.weight": torch.full((64,), 3e38)}, file, metadata={"format": "pt"})
    spec = read_model_spec(folder)
    load_weights(build_model(spec, topology, torch.float32), folder, spec, topology)
