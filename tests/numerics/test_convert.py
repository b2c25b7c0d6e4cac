"""Hugging Face -> Megatron checkpoint -> Hugging Face is equal bit for bit, and a difference is found and named."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_oprd.checkpoint.format_checks import checkpoint_dtype
from megatron_oprd.checkpoint.megatron_format import load_model, save_model
from megatron_oprd.checkpoint.weights import check_weights, content_hash, load_weights, weights_dtype
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.export import WrittenWeights, export_hf
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.models.build import ModelPart, build_model
from megatron_oprd.models.compare import Comparison, compare_states, compare_weights, open_hf_model
from megatron_oprd.testing.models import TIED_ONE_LAYER_7_TO_1, random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.commands import run, run_until_start

TOOLS = Path(__file__).parents[2] / "tools" / "checkpoint_convert"
MODELS = {
    "qwen2_bias": ("Qwen2", {}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_one_layer": ("Qwen2", {"num_hidden_layers": 1}),
    "qwen2_tied_one_layer_7_to_1": (
        "Qwen2",
        TIED_ONE_LAYER_7_TO_1,
    ),
    "qwen3_head_dim_8_to_2": ("Qwen3", {}),
    "qwen3_tied_real_vocabulary": (
        "Qwen3",
        {"tie_word_embeddings": True, "vocab_size": 151936, "hidden_size": 32, "num_hidden_layers": 1},
    ),
    "qwen3_moe_one_dense_layer": ("Qwen3Moe", {}),
    "qwen2_moe_shared_expert": ("Qwen2Moe", {}),
    "qwen3_moe_every_second_layer_tied": (
        "Qwen3Moe",
        {"decoder_sparse_step": 2, "mlp_only_layers": [], "tie_word_embeddings": True},
    ),
    "llama_head_dim_8_to_2": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "phi3_fused": ("Phi3", {"num_key_value_heads": 8}),
    "qwen3_5_moe": ("Qwen3_5Moe", {}),
    "qwen3_next_tied": ("Qwen3Next", {"tie_word_embeddings": True}),
    "qwen3_5_tied": ("Qwen3_5", {"tie_word_embeddings": True}),
    "phi3_tied_8_to_2": ("Phi3", {"tie_word_embeddings": True}),
}


def hf_folder(path, family="Qwen3", dtype=torch.float32, shard_size="5GB", **overrides):
    """Save a model folder with a tokenizer and a chat template, as users have it."""
    folder = save(random_hf_model(family, **overrides).to(dtype), path, max_shard_size=shard_size)
    vocabulary = {character: i for i, character in enumerate("abcdefgh")}
    tokenizer = transformers.Qwen2Tokenizer({**vocabulary, "ab": 8, "<|endoftext|>": 9}, merges=[("a", "b")])
    tokenizer.chat_template = "{{ messages[0].content }}h"
    tokenizer.save_pretrained(folder)
    return folder


def build_from(folder, topology, dtype=None, **cut):
    spec = read_model_spec(folder)
    stage = build_model(spec, topology, dtype or weights_dtype(folder), ModelPart(**cut)).eval()
    load_weights(stage, folder, spec, topology)
    return stage, spec


def to_megatron(folder, target, topology, change=None):
    stage, spec = build_from(folder, topology)
    if change is not None:
        with torch.no_grad():
            change(named_parameters(stage))
    save_model(stage, target, spec, topology, source=folder)
    return target


def tensors_of(folder):
    reader = HFReader(folder)
    return {name: reader.read(name) for name in reader.names()}


def assert_equal_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_round_trip_is_bit_equal(name, dtype, topology, tmp_path):
    family, overrides = MODELS[name]
    folder = hf_folder(tmp_path / "hf", family, dtype, **overrides)
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    stage, spec = build_from(megatron, topology)
    export_hf(stage, spec, topology, megatron, tmp_path / "back")
    assert_equal_tensors(tensors_of(tmp_path / "back"), tensors_of(folder))
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe", "Llama", "Phi3"])
def test_a_round_trip_in_shards_is_bit_equal(family, topology, tmp_path):
    folder = hf_folder(tmp_path / "hf", family, shard_size="100KB")
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    stage, spec = build_from(megatron, topology)
    export_hf(stage, spec, topology, megatron, tmp_path / "back", WrittenWeights(max_shard_bytes=200_000))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 1
    assert_equal_tensors(tensors_of(tmp_path / "back"), tensors_of(folder))
    assert_same_model(tmp_path / "back", folder)


def assert_same_model(actual, expected):
    tokens = torch.arange(40)[None]
    models = [transformers.AutoModelForCausalLM.from_pretrained(f, dtype="auto").eval() for f in (actual, expected)]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    assert models[0].dtype == models[1].dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transformers_opens_an_export(dtype, topology, tmp_path):
    folder = hf_folder(tmp_path / "hf", "Qwen2", dtype, tie_word_embeddings=True)
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    stage, spec = build_from(megatron, topology)
    export_hf(stage, spec, topology, megatron, tmp_path / "back")
    assert_same_model(tmp_path / "back", folder)
    for where in (megatron, tmp_path / "back"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(where)
        assert tokenizer.encode("abc") == [8, 2]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "abh"
        assert json.loads((where / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        assert (where / "generation_config.json").exists()


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_loading_casts_to_the_dtype_of_the_model(stored, wanted, topology, tmp_path):
    folder = hf_folder(tmp_path / "hf", dtype=stored)
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    assert checkpoint_dtype(megatron) == stored
    actual, expected = build_from(megatron, topology, wanted)[0], build_from(folder, topology)[0]
    for (name, a), (_, b) in zip(actual.named_parameters(), expected.named_parameters(), strict=True):
        assert a.dtype == wanted
        assert torch.equal(a, b.to(wanted)), name


@pytest.mark.parametrize(("family", "tied"), [("Qwen3", False), ("Qwen3", True), ("Qwen3Moe", False)])
def test_a_cut_teacher_loads_only_its_layers(family, tied, topology, tmp_path):
    folder = hf_folder(tmp_path / "hf", family, tie_word_embeddings=tied)
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    full_model = named_parameters(build_from(folder, topology)[0])
    for cut in ({"stages": (2,), "final_norm": False}, {"stages": (5,), "final_norm": True}):
        stage, _ = build_from(megatron, topology, lm_head=False, **cut)
        for name, parameter in named_parameters(stage).items():
            assert torch.equal(parameter, full_model[name]), name


def comparison(folder, megatron, topology, dtype=torch.float32):
    stage, spec = build_from(megatron, topology, dtype)
    stored = checkpoint_dtype(megatron)
    weights = compare_weights(stage, HFReader(folder), spec, topology, stored)
    states = compare_states(stage, open_hf_model(folder, stored, dtype), spec, topology, (1, 7, 40))
    return Comparison(states, weights)


CHANGES = {
    "decoder.layers.2.mlp.linear_fc2.weight": "layer 3",
    "decoder.layers.0.self_attention.linear_qkv.weight": "layer 1",
    "decoder.layers.4.self_attention.k_layernorm.weight": "layer 5",
    "embedding.word_embeddings.weight": "embedding",
    "output_layer.weight": "head",
}


FUSED_CHANGES = {
    "decoder.layers.0.self_attention.linear_qkv.weight": "model.layers.0.self_attn.qkv_proj.weight",
    "decoder.layers.4.mlp.linear_fc1.weight": "model.layers.4.mlp.gate_up_proj.weight",
}
SPARSE_CHANGES = {
    "decoder.layers.3.mlp.router.weight": "model.layers.3.mlp.gate.weight",
    "decoder.layers.3.mlp.experts.local_experts.1.linear_fc1.weight": "model.layers.3.mlp.experts.1.gate_proj.weight",
    "decoder.layers.4.mlp.experts.local_experts.2.linear_fc2.weight": "model.layers.4.mlp.experts.2.down_proj.weight",
    "decoder.layers.1.mlp.linear_fc1.weight": "model.layers.1.mlp.gate_proj.weight",
}


def one_altered_weight(name, family, topology, folder):
    def change(parameters):
        parameters[name].view(-1)[3] += 1e-4

    hf = hf_folder(folder / "hf", family)
    found = comparison(hf, to_megatron(hf, folder / "megatron", topology, change), topology)
    assert len(found.weights) == 1
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_one_altered_weight_is_found_and_its_layer_named(name, topology, tmp_path):
    assert one_altered_weight(name, "Qwen3", topology, tmp_path).first_difference(1e-4) == CHANGES[name]


@pytest.mark.parametrize("name", SPARSE_CHANGES)
def test_one_altered_weight_of_a_mixture_of_experts_is_found(name, topology, tmp_path):
    assert one_altered_weight(name, "Qwen3Moe", topology, tmp_path).weights == (SPARSE_CHANGES[name],)


@pytest.mark.parametrize("name", FUSED_CHANGES)
def test_one_altered_weight_of_fused_tensors_is_found(name, topology, tmp_path):
    assert one_altered_weight(name, "Phi3", topology, tmp_path).weights == (FUSED_CHANGES[name],)


def test_hidden_states_alone_show_the_first_layer_that_differs(topology, tmp_path):
    def change(parameters):
        parameters["decoder.layers.2.mlp.linear_fc2.weight"][0] += 0.5

    folder = hf_folder(tmp_path / "hf")
    megatron = to_megatron(folder, tmp_path / "megatron", topology, change)
    errors = comparison(folder, megatron, topology).errors
    assert max(errors["layer 1"], errors["layer 2"]) < 1e-5 < 1e-2 < errors["layer 3"]
    assert Comparison(errors, ()).first_difference(1e-4) == "layer 3"
    assert Comparison({"layer 1": float("nan")}, ()).first_difference(1e-4) == "layer 1"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_a_faithful_conversion_compares_equal(dtype, tolerance, topology, tmp_path):
    folder = hf_folder(tmp_path / "hf", "Qwen2")
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    found = comparison(folder, megatron, topology, dtype)
    assert found.weights == ()
    assert found.first_difference(tolerance) is None


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


BREAKAGES = {
    "truncated weights": (lambda f: _truncate(f / "__0_0.distcp"), r"__0_0\.distcp is truncated"),
    "missing weights": (lambda f: (f / "__0_0.distcp").unlink(), r"__0_0\.distcp is missing"),
    "truncated index": (lambda f: _truncate(f / ".metadata"), r"\.metadata is truncated or corrupt"),
    "missing index": (lambda f: (f / ".metadata").unlink(), r"\.metadata is missing"),
    "missing metadata.json": (lambda f: (f / "metadata.json").unlink(), r"metadata\.json"),
    "missing manifest": (lambda f: (f / "megatron_oprd.json").unlink(), r"megatron_oprd\.json"),
    "missing common state": (lambda f: (f / "common.pt").unlink(), r"common\.pt"),
    "corrupt common state": (lambda f: (f / "common.pt").write_bytes(b"x" * 64), r"common\.pt is truncated or corrupt"),
    "another backend": (lambda f: (f / "metadata.json").write_text("{}"), r"metadata\.json"),
    "corrupt weights": (lambda f: (f / "__0_0.distcp").write_bytes(b"x" * 10_000_000), "cannot be read"),
    "another model": (lambda f: _edit(f, num_hidden_layers=6), "misses decoder.layers.5"),
    "fewer layers": (lambda f: _edit(f, num_hidden_layers=4), "unknown tensors"),
    "another width": (lambda f: _edit(f, intermediate_size=96), "config.json asks for"),
    "another vocabulary": (lambda f: _edit(f, vocab_size=130), "config.json asks for"),
}
SPARSE_BREAKAGES = {
    "more experts": ({"num_local_experts": 6}, "router.weight has shape"),
    "wider experts": ({"moe_intermediate_size": 48}, r"experts\.experts\.linear_fc1\.weight has shape"),
    "a sparse layer more": ({"mlp_only_layers": []}, r"misses decoder\.layers\.1\.mlp\.router"),
    "no experts": ({"num_local_experts": 0}, r"misses decoder\.layers\.0\.mlp\.linear_fc1"),
}


class Hostile:
    """An object whose unpickling calls a function."""

    def __reduce__(self):
        return os.mkdir, ("called",)


def _edit_index(folder, change):
    """Change the index of a folder in place; `change` gets the index and its entry of the embedding."""
    path = folder / ".metadata"
    index = pickle.loads(path.read_bytes())
    change(index, index.state_dict_metadata["embedding.word_embeddings.weight"])
    path.write_bytes(pickle.dumps(index))


def _rename_files(index, _):
    for stored in index.storage_data.values():
        stored.relative_path = f"../megatron/{stored.relative_path}"


def _forget_parts(index, _):
    del index.storage_data[next(key for key in index.storage_data if "embedding" in key.fqn)]


METADATA_BREAKAGES = {
    "code in the index": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Hostile())),
        r"\.metadata is truncated or corrupt: it refers to posix.mkdir, which no index contains",
    ),
    "code in the common state": (
        lambda f: torch.save({"a": Hostile()}, f / "common.pt"),
        r"common\.pt is truncated or corrupt; copy",
    ),
    "another object": (lambda f: (f / ".metadata").write_bytes(pickle.dumps({"a": 1})), "corrupt: it holds a dict"),
    "files outside of the folder": (lambda f: _edit_index(f, _rename_files), "not a file of the folder"),
    "a part of a tensor missing": (
        lambda f: _edit_index(f, lambda index, entry: entry.chunks.clear()),
        "the parts of embedding.word_embeddings.weight are not the complete tensor; copy",
    ),
    "a part without a file": (
        lambda f: _edit_index(f, _forget_parts),
        "embedding.word_embeddings.weight is in no file",
    ),
    "another shape": (
        lambda f: _edit_index(f, lambda index, entry: setattr(entry, "size", torch.Size([130, 64]))),
        "a part of embedding.word_embeddings.weight lies outside",
    ),
    "another dtype": (lambda f: _edit_manifest(f, dtype="bfloat16"), "the weights are stored as float32; correct"),
    "no dtype": (lambda f: _edit_manifest(f, dtype="int8"), "dtype='int8' must be bfloat16"),
    "no padded vocabulary": (lambda f: _edit_manifest(f, padded_vocabulary=None), "padded_vocabulary=None must be a"),
    "another padded vocabulary": (lambda f: _edit_manifest(f, padded_vocabulary=132), r"asks for \[132, 64\]"),
    "another architecture": (lambda f: _edit_manifest(f, architecture="LlamaForCausalLM"), "architecture='LlamaFor"),
    "unknown key of mcore": (
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "torch_dist", "a": 1}'),
        "metadata.json is corrupt: .*; copy the whole folder again",
    ),
    "unknown version of mcore": (
        lambda f: (f / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": {}}'),
        "metadata.json is corrupt: .*; copy the whole folder again",
    ),
}


def _edit_manifest(folder, **change):
    path = folder / "megatron_oprd.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("name", METADATA_BREAKAGES)
def test_wrong_metadata_of_a_megatron_checkpoint_is_refused_and_runs_no_code(name, topology, tmp_path, monkeypatch):
    damage, message = METADATA_BREAKAGES[name]
    monkeypatch.chdir(tmp_path)
    megatron = to_megatron(hf_folder(tmp_path / "hf", num_hidden_layers=1), tmp_path / "megatron", topology)
    damage(megatron)
    with pytest.raises(UserError, match=message) as caught:
        check_weights(megatron, read_model_spec(megatron))
    assert "\n" not in str(caught.value) and not (tmp_path / "called").exists()


def _edit(folder, **change):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change, "layer_types": None}))


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_error_of_a_broken_megatron_checkpoint_names_the_problem(name, topology, tmp_path):
    damage, message = BREAKAGES[name]
    megatron = to_megatron(hf_folder(tmp_path / "hf"), tmp_path / "megatron", topology)
    if "common state" in name and not (megatron / "common.pt").exists():
        pytest.skip("this version of megatron-core keeps the common state among the tensors")
    damage(megatron)
    spec = read_model_spec(megatron)
    with pytest.raises(UserError, match=message) as caught:
        load_model(build_model(spec, topology, torch.float32), megatron, spec, topology)
    assert str(megatron) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SPARSE_BREAKAGES)
def test_a_megatron_checkpoint_of_another_mixture_is_refused(name, topology, tmp_path):
    change, message = SPARSE_BREAKAGES[name]
    megatron = to_megatron(hf_folder(tmp_path / "hf", "Qwen3Moe"), tmp_path / "megatron", topology)
    check_weights(megatron, read_model_spec(megatron))
    _edit(megatron, **change)
    with pytest.raises(UserError, match=message):
        check_weights(megatron, read_model_spec(megatron))


def test_an_intact_folder_of_either_kind_passes_the_check(topology, tmp_path):
    folder = hf_folder(tmp_path / "hf")
    check_weights(folder, read_model_spec(folder))
    megatron = to_megatron(folder, tmp_path / "megatron", topology)
    check_weights(megatron, read_model_spec(megatron))


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_the_content_hash_changes_with_the_weights_only(kind, topology, tmp_path):
    folder = hf_folder(tmp_path / "hf")
    folder = folder if kind == "hf" else to_megatron(folder, tmp_path / "megatron", topology)
    first = content_hash(folder)
    (folder / "tokenizer.json").write_text("{}")
    moved = folder.rename(tmp_path / "moved")
    assert content_hash(moved) == first
    weights = next(moved.glob("*.safetensors" if kind == "hf" else "*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert content_hash(moved) != first


def run_tool(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, TOOLS / f"{name}.py", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_the_tools_convert_verify_and_name_an_altered_layer(topology, tmp_path):
    folder = hf_folder(tmp_path / "hf", "Qwen2", num_hidden_layers=2)
    done = run_tool("hf_to_megatron", "--hf", "hf", "--megatron", "mcore", "--dtype", "bf16", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_tool("verify", "--hf", "hf", "--megatron", "mcore", "--tensor", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run_tool("megatron_to_hf", "--megatron", "mcore", "--hf", "back", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    expected = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert_equal_tensors(tensors_of(tmp_path / "back"), expected)

    def change(parameters):
        parameters["decoder.layers.1.mlp.linear_fc1.weight"][5, 6] += 0.1

    altered = to_megatron(folder, tmp_path / "altered", topology, change)
    compared = run(tmp_path, "verify.py", f"--hf={folder}", f"--megatron={altered}")
    assert compared.code == 1
    assert "NOT equal: the first difference is in layer 2" in compared.stdout


def test_bad_input_to_a_tool_is_one_line_and_writes_nothing(tmp_path):
    folder = hf_folder(tmp_path / "hf", num_hidden_layers=1)
    (folder / "model.safetensors").write_bytes(b"x" * 64)
    refused = run_until_start("hf_to_megatron.py", f"--hf={folder}", f"--megatron={tmp_path / 'mcore'}")
    assert refused.code == 2
    assert refused.stderr.startswith(f"error: {folder}/model.safetensors is truncated or corrupt")
    assert refused.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
