"""Rotary embeddings of Llama and Phi-3 are read from config.json, and unsupported values are refused."""

import json
import math

import pytest
import torch
import transformers
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.hf.names import hf_shapes
from megatron_oprd.model_spec import Llama3Scaling, LongRope, YarnScaling
from megatron_oprd.models.rotary import Rotary
from megatron_oprd.testing.models import LLAMA3_SCALING, YARN, random_hf_model, save
from tests.helpers.configs import assert_refused, edited


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
            "type dynamic, which is not supported .its angles change",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor=None must be a positive number"),
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
def test_invalid_rope_scaling_of_llama_is_refused(change, message, tmp_path):
    assert_refused(edited("Llama", change, tmp_path, num_hidden_layers=1), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": ...}, "factor=None must be a positive number"),
        ({"factor": "4"}, "factor='4' must be a positive number"),
        ({"original_max_position_embeddings": "24"}, "original_max_position_embeddings='24' must be a positive whole"),
        ({"beta_fast": 0.05}, "beta_fast=0.05 must be larger than beta_slow=0.1"),
        ({"beta_slow": "1"}, "beta_slow='1' must be a positive number"),
        ({"mscale": -1}, "mscale=-1 must be a positive number"),
        ({"truncate": "no"}, "truncate='no' must be true or false"),
        ({"attention_factor": 0}, "attention_factor=0 must be a positive number"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must be larger than 1 for rope scaling of type yarn"),
    ],
)
def test_invalid_yarn_is_refused(change, message, tmp_path):
    rope = {key: value for key, value in {**YARN, **change}.items() if value is not ...}
    assert_refused(edited("Qwen3", {"rope_parameters": rope}, tmp_path, num_hidden_layers=1), message)


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
        ({"sliding_window": "all"}, "sliding_window='all' must be a positive whole number"),
        ({"resid_pdrop": 0.1}, "resid_pdrop 0.1"),
        ({"embd_pdrop": 0.1}, "embd_pdrop 0.1"),
    ],
)
def test_invalid_rope_scaling_of_phi3_is_refused(change, message, tmp_path):
    folder = save(random_hf_model("Phi3", num_hidden_layers=1), tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"] |= change.pop("rope", {})
    (folder / "config.json").write_text(json.dumps({**values, **change}))
    assert_refused(folder, message)


# As files on the hub say it: `rope_scaling` beside a top-level `rope_theta`.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
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
    **{key: LLAMA_3_2_1B[key] for key in ("architectures", "model_type", "hidden_act", "rms_norm_eps")},
    **{"num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000},
    **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    **{"rope_scaling": None, "tie_word_embeddings": False, "eos_token_id": 2},
}
PHI_4_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
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


def test_configs_from_the_hub_are_read(tmp_path):
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


# As the model cards of Qwen2.5 and Qwen3 tell users to write it for contexts of 131072 tokens.
QWEN_LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    **{"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_window_layers": 36, "sliding_window": None},
    "use_sliding_window": False,
}
YARN_OPTIONS = {
    "of the model card": {},
    "type": {"type": "yarn", "rope_type": ...},
    "factor of the positions": {"factor": None},
    "below one": {"factor": 0.5},
    "no original positions": {"original_max_position_embeddings": ...},
    "betas": {"beta_fast": 5, "beta_slow": 0.5},
    "betas of zero": {"beta_fast": 0, "beta_slow": None},
    "one dimension": {"beta_fast": 1.0001, "beta_slow": 1, "truncate": False},
    "untruncated": {"truncate": False},
    "attention factor": {"attention_factor": 1.25},
    "both scales": {"mscale": 0.7, "mscale_all_dim": 1.3},
    "one scale": {"mscale": 0.7},
    "a scale of zero": {"mscale": 0, "mscale_all_dim": 1.3},
    "few original positions": {"original_max_position_embeddings": 5},
    "linear": {"rope_type": "linear", "original_max_position_embeddings": ...},
}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("name", YARN_OPTIONS)
def test_scaled_frequencies_equal_transformers_bit_for_bit(name, version, tmp_path):
    rope = {key: value for key, value in {**QWEN_LONG, **YARN_OPTIONS[name]}.items() if value is not ...}
    values = {**QWEN3_8B, "rope_scaling": rope}
    if version == 5:
        values = {**values, "rope_scaling": None, "rope_parameters": {**rope, "rope_theta": values.pop("rope_theta")}}
    spec = read_config(values, tmp_path)
    expected = Qwen3RotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path))
    rotary = Rotary(spec)
    assert torch.equal(rotary.inverse_frequencies[0], expected.inv_freq)
    assert rotary.factor == expected.attention_scaling


def test_yarn_reaches_its_factor_times_the_original_positions(tmp_path):
    plain = read_config(QWEN3_8B, tmp_path)
    scaled = read_config({**QWEN3_8B, "rope_scaling": QWEN_LONG}, tmp_path)
    assert scaled.rope_scaling == YarnScaling(4.0, 32768, 0.1 * math.log(4) + 1, 32, 1, True)
    assert (plain.max_position_embeddings, scaled.max_position_embeddings) == (40960, 131072)
    shorter = {**QWEN_LONG, "factor": 1.1}
    assert read_config({**QWEN3_8B, "rope_scaling": shorter}, tmp_path).max_position_embeddings == 40960


def test_both_config_formats_give_the_same_rotary_embedding(tmp_path):
    phi, su = read_config(PHI_4_MINI, tmp_path), {**PHI_4_MINI["rope_scaling"], "type": "su"}
    assert read_config({**PHI_4_MINI, "rope_scaling": su}, tmp_path) == phi
    now = {key: value for key, value in PHI_4_MINI.items() if not key.startswith(("rope", "partial"))}
    rope = {**PHI_4_MINI["rope_scaling"], "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
    rope["rope_type"] = rope.pop("type")
    assert read_config({**now, "rope_parameters": rope}, tmp_path) == phi
