"""A folder in any form that transformers opens has the model that transformers loads, or is refused with a way out."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.testing.models import FAMILIES, HYBRID, random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.opened_folder import assert_as_transformers

NAMES = {
    "saved without LM head": lambda name: name.removeprefix("model."),
    "the prefix twice": lambda name: f"model.{name}",
    "the prefix twice except in the LM head": lambda name: f"model.{name}" if name.startswith("model.") else name,
}


def open_folder(folder):
    spec, reader = read_model_spec(folder), HFReader(folder)
    reader.check(spec)
    return spec, reader


def rename(folder, change):
    file = folder / "model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def edit_config(folder, **values):
    """Change values of a config.json; a value of ... removes the key."""
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


@pytest.mark.parametrize("form", NAMES)
@pytest.mark.parametrize("family", ["Qwen3Moe", "Phi3"])
def test_names_with_the_prefix_missing_or_twice_are_read(family, form, tmp_path):
    folder = save(
        random_hf_model(family, num_hidden_layers=2), tmp_path, save_original_format=form != "the prefix twice"
    )
    rename(folder, NAMES[form])
    spec, reader = open_folder(folder)
    assert_as_transformers(folder, spec, reader)
    assert spec.fused_experts is (family == "Qwen3Moe" and form == "the prefix twice")


# Hybrid models without LM head are refused: Qwen3_5TextModel is the name of their text tower.
@pytest.mark.parametrize("family", [one for one in FAMILIES if one not in HYBRID])
def test_a_tied_model_saved_without_its_lm_head_is_read_and_exported_with_it(family, tmp_path):
    model = random_hf_model(family, num_hidden_layers=1, tie_word_embeddings=True)
    folder = save(model.model, tmp_path)
    spec, reader = open_folder(folder)
    assert_as_transformers(folder, spec, reader)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [f"{family}Model"]
    assert spec.architecture == f"{family}ForCausalLM" and spec.hf_config["architectures"] == [spec.architecture]


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("transformer.", "misses 12 tensors"),
        ("base_model.model.", r"base_model.model\..*, which were saved from a model inside a wrapper; save the model"),
        ("_orig_mod.", "inside a wrapper"),
    ],
)
def test_names_that_transformers_does_not_find_are_refused(prefix, message, tmp_path):
    folder = save(random_hf_model("Llama", num_hidden_layers=1), tmp_path)
    rename(folder, lambda name: prefix + name)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_one_tensor_under_two_names_is_refused(tmp_path):
    folder = save(random_hf_model("Llama", num_hidden_layers=1), tmp_path)
    file = folder / "model.safetensors"
    save_file({**load_file(file), "norm.weight": torch.ones(64)}, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"model.norm.weight twice, as model.norm.weight and as norm.weight; remove one"
    ):
        open_folder(folder)


@pytest.mark.parametrize("architectures", [..., None, [], ["Qwen3ForCausalLM", "Other"]])
def test_the_model_type_chooses_the_architecture(architectures, tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path)
    edit_config(folder, architectures=architectures)
    assert_as_transformers(folder, *open_folder(folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama', .*, does not belong to Qwen3ForCausalLM; .* to 'qwen3'"),
        ({"model_type": ...}, "model_type=None"),
        ({"model_type": ["qwen3"]}, r"model_type=\['qwen3'\]"),
        ({"model_type": "gemma", "architectures": None}, "architecture of model_type='gemma' is not supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForSequenceClassification is not supported"),
        ({"pad_token_id": 131}, "pad_token_id=131 is not in the vocabulary of 131; set it to null"),
        ({"eos_token_id": -1}, "eos_token_id=-1 must be a token id, a list of them, or null"),
        ({"initializer_range": "wide"}, "transformers refuses it, correct it: .*initializer_range"),
    ],
)
def test_a_config_of_which_transformers_makes_another_model_is_refused(values, message, tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path)
    edit_config(folder, **values)
    with pytest.raises(UserError, match=message):
        open_folder(folder)


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/other"}')
    with pytest.raises(UserError, match=r"adapter_config.json\); merge it into its model"):
        open_folder(folder)


@pytest.mark.parametrize("dtypes", [["float16"], ["bfloat16"], ["bfloat16", "float32"], ["float16", "bfloat16"]])
def test_each_dtype_and_mixed_dtypes_are_read_exactly(dtypes, tmp_path):
    folder = save(random_hf_model("Llama", num_hidden_layers=1), tmp_path)
    file = folder / "model.safetensors"
    tensors = {
        name: tensor.to(getattr(torch, dtypes[number % len(dtypes)]))
        for number, (name, tensor) in enumerate(load_file(file).items())
    }
    save_file(tensors, file, metadata={"format": "pt"})
    assert_as_transformers(folder, *open_folder(folder))


def gptq(name):
    return re.sub(r"_proj\.weight$", "_proj.qweight", name)


def absmax(name):
    return name.replace("mlp.up_proj.weight", "mlp.up_proj.weight.absmax")


STORED = {
    "float64": (torch.float64, str, "is stored as F64; save it in bfloat16, float16 or float32"),
    "int8": (torch.int8, str, "is stored as I8; use the model without quantisation"),
    "FP8 without a config": (torch.float8_e4m3fn, str, "is stored as F8_E4M3; use the model without quantisation"),
    "GPTQ without a config": (torch.int32, gptq, "qweight, a tensor of a quantised model, .* use the model without"),
    "4 bits without a config": (torch.uint8, absmax, "absmax, a tensor of a quantised model"),
}


@pytest.mark.parametrize("name", STORED)
def test_tensors_of_other_dtypes_are_refused_with_a_way_out(name, tmp_path):
    dtype, change, message = STORED[name]
    folder = save(random_hf_model("Llama", num_hidden_layers=1), tmp_path)
    file = folder / "model.safetensors"
    tensors = {change(n): t.to(dtype) if "_proj" in n else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_folder(folder)
