"""Folders of Qwen3.5: the text tower of a model for text and images is trained, all other tensors are kept."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_oprd.checkpoint.megatron_format import save_model
from megatron_oprd.checkpoint.weights import load_weights, weights_dtype
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.export import export_hf
from megatron_oprd.hf.pruned import write_pruned
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import build_model
from megatron_oprd.testing.models import DELTA_NET
from megatron_oprd.types import UserError
from tests.numerics.test_parity import megatron_states, relative

TEXT = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    **DELTA_NET,
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "patch_size": 4,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a bfloat16 text tower, a float32 vision tower and a layer that predicts more tokens."""
    path = tmp_path_factory.mktemp("models") / "qwen3_5"
    config = transformers.Qwen3_5Config(
        text_config=TEXT, vision_config=VISION, image_token_id=120, tie_word_embeddings=True
    )
    torch.manual_seed(0)
    model = transformers.Qwen3_5ForConditionalGeneration(config)
    model.model.language_model.bfloat16()
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors") | {"mtp.fc.weight": torch.randn(64, 128)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def export_through_megatron(folder, target, topology, change=None):
    """Convert a folder to Megatron and back; return the folder."""
    spec, checkpoint = read_model_spec(folder), target / "megatron"
    stage = build_model(spec, topology, weights_dtype(folder))
    load_weights(stage, folder, spec, topology)
    save_model(stage, checkpoint, spec, topology, source=folder)
    again = build_model(read_model_spec(checkpoint), topology, weights_dtype(checkpoint))
    load_weights(again, checkpoint, spec, topology)
    export_hf(again, read_model_spec(checkpoint), topology, checkpoint, target / "back")
    return target / "back"


def test_all_tensors_come_back_bit_for_bit_with_their_names(folder, topology, tmp_path):
    back = export_through_megatron(folder, tmp_path, topology)
    expected, actual = (load_file(path / "model.safetensors") for path in (folder, back))
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, back))
    assert after == before | {"dtype": "bfloat16"}
    transformers.Qwen3_5ForConditionalGeneration.from_pretrained(back, dtype="auto")


def test_the_text_tower_computes_what_transformers_computes(folder, topology):
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(0, 70)
    with torch.no_grad():
        expected = model(tokens[None], output_hidden_states=True)
    logits, states = megatron_states(folder, topology, torch.float32, [tokens])
    assert relative(logits, expected.logits[0]) < 1e-5
    for layer in (1, 2, 3):
        assert relative(states[layer], expected.hidden_states[layer][0]) < 1e-5


def test_a_pruned_folder_keeps_the_kind_of_each_block_and_all_other_tensors(folder, topology, tmp_path):
    write_pruned(folder, tmp_path / "pruned", read_model_spec(folder), (2, 3), {})
    assert read_model_spec(tmp_path / "pruned").linear_layers == (1,)
    HFReader(tmp_path / "pruned").check(read_model_spec(tmp_path / "pruned"))
    tensors = load_file(tmp_path / "pruned/model.safetensors")
    assert {"mtp.fc.weight", "model.visual.pos_embed.weight"} <= tensors.keys()
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert len(model.model.language_model.layers) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_output_gate": False}, "attn_output_gate false"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads=3 is not a multiple of linear_num_key_heads=2"),
        ({"layer_types": ["linear_attention"]}, "layer_types must be a list of 3 types"),
        ({"layer_types": ["linear_attention", "sliding_attention", "full_attention"]}, "sliding_attention"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, change, message, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_model_spec(tmp_path)


def test_left_out_fields_have_the_defaults_of_transformers(tmp_path):
    kept = ("num_hidden_layers", "hidden_size", "model_type")
    written = {"num_hidden_layers": 8, "hidden_size": 64, "model_type": "qwen3_5_text"}
    (tmp_path / "config.json").write_text(json.dumps({**written, "architectures": ["Qwen3_5ForCausalLM"]}))
    spec, default = read_model_spec(tmp_path), transformers.Qwen3_5TextConfig(**{k: written[k] for k in kept[:2]})
    assert spec.linear_layers == (0, 1, 2, 4, 5, 6)
    assert spec.rotary_dim == default.head_dim * default.rope_parameters["partial_rotary_factor"] == 64
    assert spec.delta_net.num_value_heads == default.linear_num_value_heads
