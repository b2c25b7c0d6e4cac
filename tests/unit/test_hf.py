"""Hugging Face folders: what is read, what is refused, and bit-equal conversion there and back."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.convert import from_megatron, shard, to_megatron, unshard
from megatron_oprd.hf.load import global_name
from megatron_oprd.hf.names import entries, hf_shapes, megatron_shapes, shard_shape
from megatron_oprd.hf.stream import HFReader, HFWriter, config_with_dtype
from megatron_oprd.types import Llama3Scaling, LongRope, UserError
from tests.helpers.models import FAMILIES, LLAMA3_SCALING, random_hf_model, save

MODELS = {
    "qwen2_tied_one_layer": ("Qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "qwen2_7_to_1": ("Qwen2", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3_head_dim": ("Qwen3", {}),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe_one_dense_layer": ("Qwen3Moe", {}),
    "qwen3_moe_every_second_layer": ("Qwen3Moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "phi3_fused": ("Phi3", {}),
    "phi3_fused_without_groups": ("Phi3", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", ["20KB", "5GB"])
def test_there_and_back_every_tensor_is_bit_equal(name, tensor_size, shard_bytes, tmp_path):
    family, overrides = MODELS[name]
    if tensor_size > overrides.get("num_key_value_heads", 2):
        pytest.skip("one key-value head cannot be divided over two ranks")
    folder = save(random_hf_model(family, **overrides), tmp_path / "hf", max_shard_size=shard_bytes)
    spec, reader = read_model_spec(folder), HFReader(folder)
    reader.check(spec)
    with HFWriter(tmp_path / "back", max_shard_bytes=30_000) as writer:
        for entry in entries(spec):
            whole = to_megatron(entry, [reader.read(n) for n in entry.hf], spec)
            shards = [shard(entry, whole, rank, tensor_size) for rank in range(tensor_size)]
            for hf_name, tensor in from_megatron(entry, unshard(entry, shards), spec).items():
                writer.write(hf_name, tensor)
    back = HFReader(tmp_path / "back")
    assert back.names() == reader.names()
    for hf_name in reader.names():
        assert torch.equal(back.read(hf_name), reader.read(hf_name)), hf_name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_names_exactly_what_transformers_saves(family, tmp_path):
    folder = save(random_hf_model(family), tmp_path / "hf")
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert hf_shapes(read_model_spec(folder)) == saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM .* use one of .* Phi3ForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, "linear"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),  # transformers prefers it to rope_parameters
        ({"rope_scaling": LLAMA3_SCALING}, "rope scaling of type llama3"),
        ({"rope_scaling": {"type": "longrope"}}, "rope scaling of type longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0 must be a positive number"),
        ({"head_dim": 7}, "rotates 7 of the 7 dimensions of a head"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, message, tmp_path):
    assert_refused(edited("Qwen3", change, tmp_path, num_hidden_layers=1), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": "four"}, "num_local_experts='four'"),
        ({"num_local_experts": -1}, "num_local_experts=-1"),
        ({"num_experts": 8}, "num_experts=8 contradicts num_local_experts=4"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok=None"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds num_local_experts=4"),
        ({"num_experts_per_tok": 1}, "norm_topk_prob=true with num_experts_per_tok=1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
        ({"decoder_sparse_step": 1.5}, "decoder_sparse_step=1.5"),
        ({"mlp_only_layers": 1}, "mlp_only_layers=1 must be a list"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers=.* must hold whole numbers"),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1 must be a bool"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_wrong_with_a_mixture_of_experts_is_named(change, message, tmp_path):
    assert_refused(edited("Qwen3Moe", change, tmp_path), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope scaling of type yarn"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope scaling of type longrope"),
        ({"rope_scaling": {"rope_type": None}}, "rope scaling of type None"),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": None}}, "factor=None must be a positive number"),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 0}}, "low_freq_factor=0 must be a positive number"),
        ({"rope_scaling": {**LLAMA3_SCALING, "high_freq_factor": 1}}, "high_freq_factor=1 must be larger than"),
        (
            {"rope_scaling": {**LLAMA3_SCALING, "original_max_position_embeddings": None}},
            "original_max_position_embeddings=None must be a positive whole number",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}}, "partial_rotary_factor 0.75"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_a_llama_lacks_or_asks_too_much_is_named(change, message, tmp_path):
    assert_refused(edited("Llama", change, tmp_path, num_hidden_layers=1), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": {"rope_type": "llama3"}}, "rope scaling of type llama3"),
        ({"rope": {"rope_type": "yarn"}}, "rope scaling of type yarn"),
        ({"rope": {"short_factor": None}}, "short_factor is None; it must be a list of 3 positive numbers"),
        ({"rope": {"short_factor": [1.0, 1.0]}}, "short_factor has 2 values; it must be a list of 3"),
        ({"rope": {"long_factor": [1.0] * 4}}, "long_factor has 4 values; it must be a list of 3"),
        ({"rope": {"long_factor": [1.0, 0.0, 1.0]}}, "long_factor has 3 values; it must be a list of 3 positive"),
        ({"rope": {"long_factor": [1.0, "2", 1.0]}}, "long_factor has 3 values; it must be a list of 3 positive"),
        ({"rope": {"factor": "8"}}, "factor='8' must be a positive number"),
        ({"rope": {"attention_factor": -1.0}}, "attention_factor=-1.0 must be a positive number"),
        ({"rope": {"partial_rotary_factor": 0.4}}, "partial_rotary_factor=0.4 rotates 3 of the 8 dimensions"),
        ({"rope": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor=1.5 rotates 12 of the 8 dimensions"),
        ({"rope": {"partial_rotary_factor": "half"}}, "partial_rotary_factor='half' must be a positive number"),
        ({"original_max_position_embeddings": None}, "original_max_position_embeddings=None must be"),
        ({"original_max_position_embeddings": 1}, "original_max_position_embeddings=1 must be a whole number of at l"),
        ({"sliding_window": 79}, "sliding_window 79 below its 80 positions, which is not supported"),
        ({"sliding_window": "all"}, "sliding_window='all' must be a positive whole number"),
        ({"resid_pdrop": 0.1}, "resid_pdrop 0.1"),
        ({"embd_pdrop": 0.1}, "embd_pdrop 0.1"),
    ],
)
def test_what_a_phi3_lacks_or_asks_too_much_is_named(change, message, tmp_path):
    folder = save(random_hf_model("Phi3", num_hidden_layers=1), tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] |= change.pop("rope", {})
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    assert_refused(folder, message)


# As files on the hub say it: `rope_scaling` beside a top-level `rope_theta`.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    **{"attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0, "pretraining_tp": 1, "hidden_act": "silu"},
    **{"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072},
    **{"rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": True, "eos_token_id": [128001, 128008]},
    "rope_scaling": {
        **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 8192,
    },
}
LLAMA_2_7B = {
    **{key: LLAMA_3_2_1B[key] for key in ("architectures", "hidden_act", "pretraining_tp", "rms_norm_eps")},
    **{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    **{"rope_scaling": None, "tie_word_embeddings": False, "eos_token_id": 2},
}
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    **{"attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "hidden_act": "silu"},
    **{"num_hidden_layers": 32, "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 200064},
    **{"num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    **{"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "sliding_window": 262144},
    **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "eos_token_id": 199999},
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48},
}


def read_config(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return read_model_spec(tmp_path)


def test_configs_as_they_are_on_the_hub(tmp_path):
    llama = read_config(LLAMA_3_2_1B, tmp_path)
    assert (llama.rotary_dim, llama.rope_theta, llama.tied_embeddings) == (64, 500000.0, True)
    assert llama.rope_scaling == Llama3Scaling(32.0, 1.0, 4.0, 8192)
    assert sum(map(math.prod, hf_shapes(llama).values())) == 1_235_814_400
    plain = read_config(LLAMA_2_7B, tmp_path)
    assert (plain.head_dim, plain.rope_theta, plain.rope_scaling) == (128, 10000.0, None)
    assert sum(map(math.prod, hf_shapes(plain).values())) == 6_738_415_616
    phi = read_config(PHI_4_MINI, tmp_path)
    assert (phi.head_dim, phi.rotary_dim, phi.rope_theta, phi.tied_embeddings) == (128, 96, 10000.0, True)
    assert phi.rope_scaling == LongRope((1.0,) * 48, (1.5,) * 48, 4096, math.sqrt(1 + math.log(32) / math.log(4096)))
    assert sum(map(math.prod, hf_shapes(phi).values())) == 3_836_021_760


def test_both_ways_to_write_the_rotary_embedding_say_the_same(tmp_path):
    phi, su = read_config(PHI_4_MINI, tmp_path), {**PHI_4_MINI["rope_scaling"], "type": "su"}
    assert read_config({**PHI_4_MINI, "rope_scaling": su}, tmp_path) == phi
    now = {key: value for key, value in PHI_4_MINI.items() if not key.startswith(("rope", "partial"))}
    rope = {**PHI_4_MINI["rope_scaling"], "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    rope["rope_type"] = rope.pop("type")
    assert read_config({**now, "rope_parameters": rope}, tmp_path) == phi


def edited(family, change, tmp_path, **overrides):
    folder = save(random_hf_model(family, **overrides), tmp_path / "hf")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return folder


def assert_refused(folder, message):
    with pytest.raises(UserError, match=message) as caught:
        read_model_spec(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("step", "dense", "experts"),
    [
        (1, [], 4),
        (1, [0, 3], 4),
        (2, [], 4),
        (2, [1], 4),
        (3, None, 4),
        (1, [0, 1, 2, 3, 4], 4),
        (7, [], 4),
        (1, [], 0),
    ],
)
def test_the_sparse_layers_are_those_of_transformers(step, dense, experts, tmp_path):
    model = random_hf_model("Qwen3Moe", decoder_sparse_step=step, mlp_only_layers=dense, num_experts=experts)
    sparse = tuple(n for n, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    spec = read_model_spec(save(model, tmp_path / "hf"))
    assert (spec.sparse_layers, spec.num_experts) == (sparse, experts if sparse else 0)
    HFReader(tmp_path / "hf").check(spec)


def test_the_experts_of_a_config_by_its_older_name(tmp_path):
    spec = read_model_spec(save(random_hf_model("Qwen3Moe"), tmp_path / "hf"))
    assert (spec.num_experts, spec.experts_per_token, spec.moe_ffn_hidden_size) == (4, 2, 40)
    assert (spec.norm_topk_prob, spec.sparse_layers) == (True, (0, 2, 3, 4))
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    values["num_experts"] = values.pop("num_local_experts")
    path.write_text(json.dumps(values))
    assert read_model_spec(tmp_path / "hf") == spec


def test_names_count_layers_and_experts_over_the_whole_model():
    expert = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"
    assert global_name(expert, 3, 4) == "decoder.layers.4.mlp.experts.local_experts.4.linear_fc1.weight"
    assert global_name("decoder.layers.0.mlp.router.weight", 10, 4) == "decoder.layers.10.mlp.router.weight"
    assert global_name("decoder.final_layernorm.weight", 3, 4) == "decoder.final_layernorm.weight"
    assert global_name("embedding.word_embeddings.weight", 3, 4) == "embedding.word_embeddings.weight"


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


BREAKAGES = {
    "truncated": (_truncate, "truncated or corrupt"),
    "corrupt": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 64), "truncated or corrupt"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin",
    ),
    "no index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "not their index",
    ),
    "missing shard": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}'),
        "gone.safetensors is missing",
    ),
    "lying index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}'),
        "does not hold a",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_checkpoint_is_one_line_that_names_the_file(name, tmp_path):
    damage, message = BREAKAGES[name]
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "hf")
    damage(folder)
    with pytest.raises(UserError, match=message):
        HFReader(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "misses"),
        ({"num_hidden_layers": 0.5}, "unknown"),
        ({"intermediate_size": 96}, "asks for"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(change, message, tmp_path):
    layers = 2 if change.get("num_hidden_layers") == 0.5 else 1
    folder = save(random_hf_model("Qwen3", num_hidden_layers=layers), tmp_path / "hf")
    path = folder / "config.json"
    change = {**change, "num_hidden_layers": 1} if layers == 2 else change
    path.write_text(json.dumps({**json.loads(path.read_text()), **change, "layer_types": None}))
    with pytest.raises(UserError, match=message):
        HFReader(folder).check(read_model_spec(folder))


def test_a_failed_export_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), HFWriter(tmp_path / "out") as writer:
        writer.write("a", torch.zeros(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["Qwen3", "Qwen3Moe", "Phi3"])
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_shapes_of_megatron_parameters_are_those_of_converted_tensors(tensor_size, family, tmp_path):
    folder = save(random_hf_model(family), tmp_path / "hf")
    spec, reader = read_model_spec(folder), HFReader(folder)
    shapes = megatron_shapes(spec, tensor_size)
    for entry in entries(spec):
        whole = to_megatron(entry, [reader.read(n) for n in entry.hf], spec)
        shards = [shard(entry, whole, rank, tensor_size) for rank in range(tensor_size)]
        assert tuple(unshard(entry, shards).shape) == shapes[entry.megatron]
        assert {tuple(s.shape) for s in shards} == {shard_shape(entry, shapes[entry.megatron], tensor_size)}


@pytest.mark.parametrize(
    ("first", "second", "widest"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_the_dtype_of_a_folder_holds_every_tensor(first, second, widest, tmp_path):
    tensors = {"a": torch.zeros(2, dtype=first), "b": torch.zeros(2, dtype=second)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert HFReader(tmp_path).dtype() == widest


def test_a_quantised_tensor_is_refused_by_name(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="a is stored as I8"):
        HFReader(tmp_path).dtype()


def test_files_beside_the_weights_are_copied_and_weights_are_not(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    kept = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "vocab.json"]
    kept += ["special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template.jinja"]
    kept += ["additional_chat_templates/tool.jinja", "LICENSE"]
    for name in [*kept, "config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "optimizer.pt"]:
        (source / name).write_text(name)
    with HFWriter(tmp_path / "out", companions=source, config={"torch_dtype": "float32"}) as writer:
        writer.write("a", torch.zeros(3))
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert files == {*kept, "config.json", "model.safetensors"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": "float32"}


def test_the_exported_config_names_the_dtype_under_the_key_it_used():
    assert config_with_dtype({"dtype": "float32"}, torch.bfloat16) == {"dtype": "bfloat16"}
    assert config_with_dtype({"torch_dtype": "float32"}, torch.bfloat16) == {"torch_dtype": "bfloat16"}
