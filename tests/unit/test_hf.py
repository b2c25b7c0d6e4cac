"""Hugging Face folders are read, checked and converted bit for bit."""

import json
import math
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megatron_oprd.hf.companions import config_with_dtype
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.convert import fill_shard, from_megatron, unshard
from megatron_oprd.hf.load import global_name
from megatron_oprd.hf.names import entries, hf_shapes, megatron_shapes, shard_shape
from megatron_oprd.hf.reader import HFReader
from megatron_oprd.hf.writer import HFWriter
from megatron_oprd.runtime.files import LFS_START
from megatron_oprd.testing.models import FAMILIES, LLAMA3_SCALING, random_hf_model, save
from megatron_oprd.types import UserError
from tests.helpers.configs import assert_refused, edited

WINDOW = {"use_sliding_window": True, "sliding_window": 7}
MODELS = {
    "qwen2_tied_one_layer": ("Qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 1}),
    "qwen2_7_to_1": ("Qwen2", {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "qwen3_head_dim": ("Qwen3", {}),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe_one_dense_layer": ("Qwen3Moe", {}),
    "qwen2_moe_shared_expert": ("Qwen2Moe", {}),
    "qwen3_moe_every_second_layer": ("Qwen3Moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "phi3_fused": ("Phi3", {}),
    "qwen3_5": ("Qwen3_5", {}),
    "qwen3_5_moe": ("Qwen3_5Moe", {}),
    "qwen3_next": ("Qwen3Next", {}),
    "phi3_fused_without_groups": ("Phi3", {"num_key_value_heads": 8, "tie_word_embeddings": True}),
}


def read_shards(entry, reader, spec, tensor_size):
    """Return the shards of all tensor-parallel ranks, read into memory that is not zero."""
    shape = shard_shape(entry, megatron_shapes(spec, tensor_size)[entry.megatron], tensor_size)
    shards = [torch.full(shape, torch.nan) for _ in range(tensor_size)]
    for rank, shard in enumerate(shards):
        fill_shard(shard, entry, reader, spec, rank, tensor_size)
    return shards


class CountingReader(HFReader):
    """Counts the elements that are read."""

    read_elements = 0

    def _rows(self, *args):
        rows = super()._rows(*args)
        self.read_elements += rows.numel()
        return rows


@pytest.mark.parametrize("family", ["Qwen3", "Phi3", "Qwen3_5"])
def test_two_ranks_read_each_row_once(family, tmp_path):
    folder = save(random_hf_model(family), tmp_path / "hf")
    spec = read_model_spec(folder)
    for entry in entries(spec):
        if entry.layout in ("qkv", "gate_up", "delta", "vocabulary"):
            reader = CountingReader(folder)
            read_shards(entry, reader, spec, 2)
            assert reader.read_elements == sum(math.prod(hf_shapes(spec)[name]) for name in entry.hf)


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_bytes", ["20KB", "5GB"])
def test_a_round_trip_is_bit_equal(name, tensor_size, shard_bytes, tmp_path):
    family, overrides = MODELS[name]
    if tensor_size > overrides.get("num_key_value_heads", 2):
        pytest.skip("one key-value head cannot be divided over two ranks")
    folder = save(random_hf_model(family, **overrides), tmp_path / "hf", max_shard_size=shard_bytes)
    spec, reader = read_model_spec(folder), HFReader(folder)
    reader.check(spec)
    with HFWriter(tmp_path / "back", max_shard_bytes=30_000) as writer:
        for entry in entries(spec):
            shards = read_shards(entry, reader, spec, tensor_size)
            for hf_name, tensor in from_megatron(entry, unshard(entry, shards), spec).items():
                writer.write(hf_name, tensor)
    back = HFReader(tmp_path / "back")
    assert back.names() == reader.names()
    for hf_name in reader.names():
        assert torch.equal(back.read(hf_name), reader.read(hf_name)), hf_name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_has_exactly_the_tensors_of_transformers(family, tmp_path):
    folder = save(random_hf_model(family), tmp_path / "hf")
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert hf_shapes(read_model_spec(folder)) == saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM .* use one of .* Phi3ForCausalLM"),
        ({"architectures": [["LlamaForCausalLM"]]}, "is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ({"rope_scaling": {"type": "proportional"}, "rope_parameters": None}, "proportional"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "dynamic"),  # transformers prefers it to rope_parameters
        ({"rope_scaling": LLAMA3_SCALING}, "rope scaling of type llama3"),
        ({"rope_scaling": {"type": "longrope"}}, "rope scaling of type longrope"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta=-1.0 must be a positive number"),
        ({"head_dim": 7}, "rotates 7 of the 7 dimensions of a head"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0 must be a positive whole number"),
        ({**WINDOW, "max_window_layers": -1, "layer_types": None}, "max_window_layers=-1 must be a non-negative"),
        ({**WINDOW, "layer_types": ["sliding_attention"] * 2}, "layer_types has 2 entries for 1 layers; correct it"),
        ({"layer_types": ["sliding_attention"]}, "names sliding_attention, but the model has no window; set use_sli"),
        ({"layer_types": ["chunked_attention"]}, "chunked_attention"),
        ({"layer_types": [None, "full_attention", []]}, "layer_types"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_an_unsupported_feature_is_refused_by_name(change, message, tmp_path):
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
def test_an_invalid_mixture_of_experts_is_refused(change, message, tmp_path):
    assert_refused(edited("Qwen3Moe", change, tmp_path), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size=0 must be a positive whole number"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"qkv_bias": False}, "qkv_bias false"),
    ],
)
def test_an_invalid_shared_expert_is_refused(change, message, tmp_path):
    assert_refused(edited("Qwen2Moe", change, tmp_path), message)


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


def test_both_keys_for_the_number_of_experts_are_accepted(tmp_path):
    spec = read_model_spec(save(random_hf_model("Qwen3Moe"), tmp_path / "hf"))
    assert (spec.num_experts, spec.experts_per_token, spec.moe_ffn_hidden_size) == (4, 2, 40)
    assert (spec.norm_topk_prob, spec.sparse_layers) == (True, (0, 2, 3, 4))
    path = tmp_path / "hf" / "config.json"
    values = json.loads(path.read_text())
    values["num_experts"] = values.pop("num_local_experts")
    path.write_text(json.dumps(values))
    assert read_model_spec(tmp_path / "hf") == spec


@pytest.mark.parametrize(
    ("family", "settings", "windowed"),
    [
        ("Qwen2", {"sliding_window": 7}, ()),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 7}, ()),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3}, (3, 4)),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}, (0, 1, 2, 3, 4)),
        ("Qwen3", {"use_sliding_window": True, "sliding_window": 40_000, "max_window_layers": 0}, ()),
        ("Mistral", {"sliding_window": None}, ()),
        ("Mistral", {}, (0, 1, 2, 3, 4)),
        ("Phi3", {"sliding_window": 79}, (0, 1, 2, 3, 4)),
        ("Phi3", {"sliding_window": 80}, ()),
    ],
)
@pytest.mark.parametrize("listed", [True, False])
def test_layers_with_a_sliding_window_are_those_of_transformers(family, settings, windowed, listed, tmp_path):
    folder = save(random_hf_model(family, **settings), tmp_path / "hf")
    if not listed:  # as transformers 4 wrote it
        values = json.loads((folder / "config.json").read_text())
        values.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(values))
    spec = read_model_spec(folder)
    assert spec.windowed_layers == windowed
    assert spec.sliding_window == (transformers.AutoConfig.from_pretrained(folder).sliding_window if windowed else 0)


def test_global_names_count_layers_and_experts_over_all_ranks():
    expert = "decoder.layers.1.mlp.experts.local_experts.0.linear_fc1.weight"
    assert global_name(expert, 3, 4) == "decoder.layers.4.mlp.experts.local_experts.4.linear_fc1.weight"
    assert global_name("decoder.layers.0.mlp.router.weight", 10, 4) == "decoder.layers.10.mlp.router.weight"
    assert global_name("decoder.final_layernorm.weight", 3, 4) == "decoder.final_layernorm.weight"
    assert global_name("embedding.word_embeddings.weight", 3, 4) == "embedding.word_embeddings.weight"


def _truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _shard(folder, weight_map, *, complete=False):
    """Turn the single file into a shard with an index; `complete` adds the tensors of the shard to the index."""
    shard = folder / "shard.safetensors"
    (folder / "model.safetensors").rename(shard)
    names = load_file(shard) if complete else {}
    entries = {**dict.fromkeys(names, "shard.safetensors"), **weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": entries}))


def _second_set(folder, change):
    """Add a sharded copy of the single file with `change` added to the last norm."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += change
    save_file(tensors, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    entries = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": entries}))


BREAKAGES = {
    "truncated": (_truncate, "truncated or corrupt"),
    "corrupt": (lambda f: (f / "model.safetensors").write_bytes(b"x" * 64), "truncated or corrupt"),
    "pointer": (lambda f: (f / "model.safetensors").write_bytes(LFS_START), "is a pointer of Git LFS; get the file"),
    "missing": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors"),
    "pickled": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"pytorch_model\.bin",
    ),
    "no index": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "not their index",
    ),
    "missing shard": (lambda f: _shard(f, {"a": "gone.safetensors"}), "gone.safetensors is missing"),
    "lying index": (lambda f: _shard(f, {"a": "shard.safetensors"}, complete=True), "does not hold a"),
    "tensors that the index does not name": (
        lambda f: _shard(f, {"model.norm.weight": "shard.safetensors"}),
        "shard.safetensors holds lm_head.weight, but model.safetensors.index.json does not name it",
    ),
    "tensors that the index puts elsewhere": (
        lambda f: (
            shutil.copy(f / "model.safetensors", f / "b.safetensors"),
            _shard(f, {"lm_head.weight": "b.safetensors"}, complete=True),
        ),
        "holds .*, but model.safetensors.index.json puts it into",
    ),
    "absolute path": (lambda f: _shard(f, {"a": "/etc/passwd"}), "names '/etc/passwd'; name files in the folder"),
    "parent path": (lambda f: _shard(f, {"a": "../other/model.safetensors"}), "without a path"),
    "two sets of weights": (lambda f: _second_set(f, 1.0), "two sets of weights, .* which differ in model.norm.weight"),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_the_error_of_a_broken_checkpoint_is_one_line_that_names_the_file(name, tmp_path):
    damage, message = BREAKAGES[name]
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "hf")
    damage(folder)
    with pytest.raises(UserError, match=message):
        HFReader(folder)


def loads_like_transformers(folder):
    """Assert that the reader returns the tensors of the model that transformers loads from a folder."""
    reader, spec = HFReader(folder), read_model_spec(folder)
    reader.check(spec)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = dict(model.named_parameters())
    if spec.tied_embeddings:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    for name in (name for entry in entries(spec) for name in entry.hf):
        torch.testing.assert_close(reader.read(name), expected[name].data, rtol=0, atol=0)


BUFFERS = {
    "rotary frequencies": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)},
    "rotary frequencies of the model": {"model.rotary_emb.inv_freq": torch.ones(12)},
    "masks": {
        "model.layers.0.self_attn.masked_bias": torch.ones(1),
        "model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    },
    "positions": {"model.position_ids": torch.arange(3)},
}


@pytest.mark.parametrize("buffers", BUFFERS.values(), ids=BUFFERS)
def test_buffers_among_the_weights_are_ignored_as_transformers_does(buffers, tmp_path):
    folder = save(random_hf_model("Llama", num_hidden_layers=1), tmp_path / "hf")
    single = folder / "model.safetensors"
    save_file(load_file(single) | buffers, single, metadata={"format": "pt"})
    assert HFReader(folder).dtype() == torch.float32
    loads_like_transformers(folder)


@pytest.mark.parametrize("change", ["same twice", "stale index", "a shard too many"])
def test_files_beside_the_weights_are_ignored_as_transformers_does(change, tmp_path):
    folder = save(random_hf_model("Llama", num_hidden_layers=1), tmp_path / "hf")
    index = folder / "model.safetensors.index.json"
    if change == "same twice":
        _second_set(folder, 0.0)
    elif change == "stale index":
        index.write_text('{"weight_map": {"lm_head.weight": "gone.safetensors"}}')
    else:
        _shard(folder, {}, complete=True)
        save_file({"lm_head.weight": torch.zeros(131, 64)}, folder / "model-00002-of-00002.safetensors")
    loads_like_transformers(folder)


def test_another_head_of_a_tied_model_is_refused(tmp_path):
    folder = save(random_hf_model("Llama", num_hidden_layers=1, tie_word_embeddings=True), tmp_path / "hf")
    single, spec = folder / "model.safetensors", read_model_spec(folder)
    tensors = load_file(single)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, single, metadata={"format": "pt"}
    )
    loads_like_transformers(folder)
    head = tensors["model.embed_tokens.weight"].clone()
    head[3, 3] += 1
    save_file(tensors | {"lm_head.weight": head}, single, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lm_head.weight differs from .*set tie_word_embeddings to false"):
        HFReader(folder).check(spec)


def test_a_model_without_its_head_is_refused(tmp_path):
    folder = save(random_hf_model("Qwen3", num_hidden_layers=1), tmp_path / "hf")
    single, spec = folder / "model.safetensors", read_model_spec(folder)
    tensors = load_file(single)
    del tensors["lm_head.weight"]
    save_file(tensors, single)
    with pytest.raises(UserError, match=r"holds no lm_head.weight; .* set tie_word_embeddings to true in config.json"):
        HFReader(folder).check(spec)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "left_out",
    [
        ("num_key_value_heads", "head_dim"),
        ("rms_norm_eps", "tie_word_embeddings", "hidden_act"),
        ("max_position_embeddings", "rope_theta", "rope_parameters", "rope_scaling"),
        ("eos_token_id", "bos_token_id"),
        ("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"),
        ("moe_intermediate_size", "shared_expert_intermediate_size", "decoder_sparse_step"),
    ],
)
def test_fields_left_out_of_a_config_have_the_defaults_of_transformers(family, left_out, tmp_path):
    written = random_hf_model(family, hidden_size=256, num_attention_heads=32, num_key_value_heads=32).config.to_dict()
    values = {key: value for key, value in written.items() if key not in left_out}
    values["architectures"] = [f"{family}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"layer_types": None}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    if family == "Phi3" and "rope_parameters" in left_out:
        return  # without them, a Phi-3 has no long context
    spec = read_model_spec(tmp_path)
    assert spec.num_query_groups == config.num_key_value_heads
    assert spec.head_dim == (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    assert (spec.norm_epsilon, spec.tied_embeddings) == (config.rms_norm_eps, config.tie_word_embeddings)
    assert spec.max_position_embeddings == config.max_position_embeddings
    assert spec.rope_theta == config.rope_parameters["rope_theta"]
    assert spec.eos_token_ids == (() if config.eos_token_id is None else (config.eos_token_id,))
    if family in ("Qwen3Moe", "Qwen2Moe"):
        assert spec.shared_ffn_hidden_size == getattr(config, "shared_expert_intermediate_size", 0)
        assert spec.moe_ffn_hidden_size == config.moe_intermediate_size
        assert (spec.num_experts, spec.experts_per_token) == (config.num_experts, config.num_experts_per_tok)
        assert spec.norm_topk_prob == config.norm_topk_prob


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


def test_a_failed_export_leaves_no_files(tmp_path):
    with pytest.raises(RuntimeError), HFWriter(tmp_path / "out") as writer:
        writer.write("a", torch.zeros(3))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("first", "second", "widest"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_the_dtype_of_a_folder_represents_every_tensor(first, second, widest, tmp_path):
    tensors = {"a": torch.zeros(2, dtype=first), "b": torch.zeros(2, dtype=second)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert HFReader(tmp_path).dtype() == widest


def test_a_quantised_tensor_is_refused_by_name(tmp_path):
    save_file({"a": torch.zeros(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="a is stored as I8"):
        HFReader(tmp_path).dtype()


def test_companion_files_are_copied_without_weights(tmp_path):
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


def test_the_exported_config_keeps_its_key_for_the_dtype():
    assert config_with_dtype({"dtype": "float32"}, torch.bfloat16) == {"dtype": "bfloat16"}
    assert config_with_dtype({"torch_dtype": "float32"}, torch.bfloat16) == {"torch_dtype": "bfloat16"}
