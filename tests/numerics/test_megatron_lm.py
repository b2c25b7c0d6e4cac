"""Checkpoints of Megatron-LM: a stock GPTModel, saved by Megatron-Core, is read, trained and written here, and the
stock model reads it back. tests/numerics/test_te_stand_in.py does the same with Transformer Engine's layer spec."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from megatron_oprd.checkpoint.format_checks import stored_shapes
from megatron_oprd.checkpoint.megatron_lm import is_megatron_lm, open_model
from megatron_oprd.checkpoint.weights import check_weights, content_hash
from megatron_oprd.commands import convert
from megatron_oprd.config import TeacherConfig, load_config
from megatron_oprd.data.tokenizer import load_tokenizer
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.setup import check_model_weights, read_setup
from megatron_oprd.runtime.files import write_json
from megatron_oprd.types import UserError
from tests.helpers.megatron_lm import MODELS, arguments_of, load_stock, round_trip, save_as_megatron_lm, stock_model
from tests.helpers.te_models import VOCAB

ROUNDING_FP32 = 1e-5
RUN = ["train.run_dir=unused", "rollout.engine=replay", "rollout.path=unused", "train.device=cpu"]


@pytest.mark.parametrize("name", MODELS)
def test_a_stock_model_reads_back_what_was_trained_from_its_checkpoint(name, topology, tmp_path):
    distance = round_trip("local", name, tmp_path, topology)
    assert distance["read"] < ROUNDING_FP32
    assert distance["trained"] > 1e-3
    assert distance["returned"] < ROUNDING_FP32
    assert distance["returned_from_own"] < ROUNDING_FP32


@pytest.fixture(scope="module")
def saved(topology, tmp_path_factory):
    """Return the root of a dense checkpoint, and a folder with the tokenizer of its model."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    tokenizer = transformers.Qwen2Tokenizer({**{c: i for i, c in enumerate("abcdefgh")}, "ab": 8}, merges=[("a", "b")])
    tokenizer.save_pretrained(folder / "tokenizer")
    return save_as_megatron_lm(stock_model("local"), folder / "saved", topology), folder / "tokenizer"


@pytest.fixture
def root(saved, tmp_path):
    """Return a copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "root"))


def write_arguments(root, **changes):
    """Write a common.pt with changed arguments, as before Megatron-Core 0.19, and return its path."""
    path = root / "iter_0000100" / "common.pt"
    torch.save({"args": arguments_of(stock_model("local"), **changes)}, path)
    return path


def convert_to(target, *options):
    return convert.convert(convert.PARSER.parse_args(["--megatron", str(target), *map(str, options)]))


def test_convert_reads_and_writes_megatron_lm(saved, topology, tmp_path):
    root, tokenizer = saved
    convert_to(tmp_path / "own", "--checkpoint", root, "--hf", tokenizer)
    assert read_model_spec(tmp_path / "own").architecture == "Qwen3ForCausalLM"
    assert load_tokenizer(tmp_path / "own")("ab")["input_ids"] == [8]
    convert_to(tmp_path / "back", "--checkpoint", tmp_path / "own", "--format", "megatron-lm")
    loaded = load_stock(stock_model("local"), tmp_path / "back", topology)
    for name, parameter in stock_model("local").named_parameters():  # the weights depend on a seed alone
        assert torch.equal(loaded.get_parameter(name), parameter), name


def test_a_run_reads_the_checkpoint_beside_a_hugging_face_folder(saved, tmp_path):
    root, tokenizer = saved
    convert_to(tmp_path / "own", "--checkpoint", root, "--hf", tokenizer)
    shutil.copytree(tmp_path / "own", tmp_path / "hf", ignore=shutil.ignore_patterns("*.distcp", ".metadata", "*oprd*"))
    config = load_config(None, [*RUN, f"student.path={root}", f"student.hf={tmp_path / 'hf'}", f"teacher.path={root}"])
    with pytest.raises(UserError, match=r"teacher.hf, or convert it: megatron-oprd convert --checkpoint"):
        read_setup(config, config.named_teachers)
    setup = read_setup(config, {"": config.teacher.model_copy(update={"hf": str(tmp_path / "hf")})})
    assert setup.student == setup.teachers[""].spec == read_model_spec(tmp_path / "own")
    base = {"path": str(tmp_path / "own"), "base": {"path": str(root)}}
    with pytest.raises(UserError, match=r"^teacher.base.path=.*; name the Hugging Face folder .* as teacher.base.hf"):
        read_setup(config, {"": TeacherConfig.model_validate(base)})
    base["base"]["hf"] = str(tmp_path / "hf")
    assert read_setup(config, {"": TeacherConfig.model_validate(base)}).teachers[""].spec == setup.student
    check_model_weights(config, setup)
    assert content_hash(root) == content_hash(root / "iter_0000100")


class Exploit:
    """Create a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_no_code_in_the_unsharded_state_is_run(root, tmp_path):
    exploit = Exploit(tmp_path / "exploited")
    path = write_arguments(root, rerun_mode=exploit)
    assert open_model(root).arguments.shape()["num_layers"] == 3
    assert not (tmp_path / "exploited").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "exploited").exists()  # the file does contain code


def test_arguments_in_run_config_yaml_come_before_those_in_common_pt(root):
    flat = {
        **{"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "num_query_groups": 2},
        **{"kv_channels": 16, "qk_layernorm": True, "normalization": "RMSNorm", "gated_linear_unit": True},
        **{"add_bias_linear": False, "position_embedding_type": "rope", "rotary_base": 5000.0, "seq_length": 64},
        **{"share_embeddings_and_output_weights": False, "window_size": None},
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "_target_": "megatron.bridge.models.qwen.qwen_provider.Qwen3ModelProvider",
    }
    nested = {"_builder_": "b", "transformer": {**flat, "activation_func": "silu"}, "rotary_base": 5000.0}
    for model in (flat, nested):
        (root / "iter_0000100/run_config.yaml").write_text(yaml.safe_dump({"model": model, "checkpoint": {}}))
        shape = open_model(root).arguments.shape()
        assert (shape["rope_theta"], shape["num_layers"], shape["qk_norm"]) == (5000.0, 3, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalization": "LayerNorm"}, "normalization='LayerNorm' is not supported; supported: 'RMSNorm'"),
        ({"swiglu": False}, "gated_linear_unit=False is not supported; supported: True"),
        ({"add_bias_linear": True}, "add_bias_linear=True is not supported; supported: False"),
        ({"position_embedding_type": "yarn"}, "position_embedding_type='yarn' is not supported; supported: 'rope'"),
        ({"rotary_interleaved": True}, "rotary_interleaved=True is not supported"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5 is not supported; use 1.0"),
        ({"apply_layernorm_1p": True}, "layernorm_zero_centered_gamma=True is not supported"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not supported"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1 is not supported"),
        ({"num_experts": 4, "moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
        ({"num_experts": 4, "moe_layer_freq": [1]}, "moe_layer_freq=[1] must be a whole number or a list of 3"),
        ({"num_experts": 4, "moe_shared_expert_intermediate_size": 8}, "without moe_shared_expert_gate"),
        ({"add_qkv_bias": True}, "no supported family has num_experts=0, no shared expert, add_qkv_bias=True"),
        ({"num_layers": None}, "num_layers=None must be a positive whole number"),
        (
            {"use_rope_scaling": True},
            "use_rope_scaling is supported without add_qkv_bias and qk_layernorm; use another",
        ),
    ],
)
def test_an_argument_that_cannot_be_meant_equally_is_refused_by_name(changes, message, root):
    path = write_arguments(root, **changes)
    stored = open_model(root)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        stored.arguments.hf_config(stored.padded_vocabulary)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: truncate(write_arguments(root)), "common.pt is truncated or corrupt"),
        (lambda root: truncate(root / "iter_0000100/__0_0.distcp"), "__0_0.distcp is truncated"),
        (lambda root: (root / "iter_0000100/.metadata").unlink(), ".metadata is missing; copy the whole folder again"),
        (lambda root: shutil.rmtree(root / "iter_0000100"), "names iter_0000100, which is missing"),
        (lambda root: (root / "latest_checkpointed_iteration.txt").write_text("x"), "'x' in place of an iteration"),
        (lambda root: (root / "latest_checkpointed_iteration.txt").unlink(), "the last is"),
        (lambda root: (root / "iter_0000100/mp_rank_00").mkdir(), "old format (mp_rank_00)"),
        (lambda root: (root / "iter_0000100/run_config.yaml").write_text("a: ["), "is no run_config.yaml"),
        (
            lambda root: (root / "iter_0000100/metadata.json").write_text('{"sharded_backend": "zarr"}'),
            "sharded_backend='zarr' is not supported; save it as torch_dist",
        ),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(damage, message, root):
    damage(root)
    assert is_megatron_lm(root)
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        open_model(root)
    assert "\n" not in str(refused.value)


def test_layers_of_multi_token_prediction_are_refused_by_name(topology, tmp_path):
    root = save_as_megatron_lm(stock_model("local", mtp_num_layers=1), tmp_path / "saved", topology)
    with pytest.raises(UserError, match=r"multi-token prediction \(mtp.layers.0.eh_proj.weight\).*--mtp-num-layers"):
        open_model(root)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e6}, "the arguments give rope_theta=10000, but config.json gives 1000000.0"),
        ({"num_query_groups": 4}, "the arguments give num_query_groups=2, but config.json gives 4"),
        ({"vocab_size": VOCAB + 1}, "embedding.word_embeddings.weight has shape [128, 64], config.json asks for [129"),
        ({"qkv_bias": True}, "the arguments give qkv_bias=False, but config.json gives True"),
    ],
)
def test_the_folder_of_another_model_is_refused(changes, message, saved, tmp_path):
    stored = open_model(saved[0])
    write_json(tmp_path / "config.json", stored.arguments.hf_config(stored.padded_vocabulary))
    spec = read_model_spec(tmp_path)
    check_weights(saved[0], spec)
    with pytest.raises(UserError, match=re.escape(message)):
        check_weights(saved[0], dataclasses.replace(spec, **changes))


def test_tensors_that_are_missing_or_unknown_are_refused(saved, tmp_path):
    stored = open_model(saved[0])
    write_json(tmp_path / "config.json", stored.arguments.hf_config(stored.padded_vocabulary))
    spec = read_model_spec(tmp_path)
    shapes = stored_shapes(spec, spec.vocab_size)
    with pytest.raises(
        UserError, match=r"holds 1 tensors that config.json does not ask for, the first is output_layer"
    ):
        stored.check({name: shape for name, shape in shapes.items() if "output_layer" not in name}, spec)
    with pytest.raises(UserError, match=r"misses decoder.layers.0.self_attention.linear_qkv.bias"):
        stored.check({**shapes, "decoder.layers.0.self_attention.linear_qkv.bias": (128,)}, spec)
