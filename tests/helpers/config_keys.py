"""The keys of a config.json that transformers uses, found in its source, and values to try for each of them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from typing import Any

import transformers
from transformers.modeling_rope_utils import RopeParameters, RotaryEmbeddingConfigMixin

from megatron_oprd.testing.models import LLAMA3_SCALING

_CONFIG = ("config", "self.config", "text_config")
# Properties and methods of a config object, and values that transformers itself sets. A config.json cannot hold them.
NOT_IN_FILES = {
    *("__class__", "_attn_implementation_internal", "_experts_implementation", "_experts_implementation_internal"),
    *("_name_or_path", "_commit_hash", "base_model_pp_plan", "base_model_tp_plan", "generation_config"),
    *("get_text_config", "sub_configs"),
}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 20}
# Unusual values of each key. Leaving the key out and null are tried for all keys.
VALUES: dict[str, list[Any]] = {
    "_attn_implementation": ["eager", 1],
    "architectures": [[], ["MistralForCausalLM"]],
    "attention_bias": [True, False],
    "attention_chunk_size": [8, "8"],
    "attention_dropout": [0, 0.1],
    "attn_implementation": ["eager", ["sdpa"]],
    "attn_output_gate": [True, False],
    "auto_map": [{"AutoConfig": "code.Config"}, 3],
    "bos_token_id": [0, -1],
    "chunk_size_feed_forward": [4],
    "configuration_files": [["config.json"], ["config.4.0.0.json"]],
    "decoder_sparse_step": [2, 0],
    "distributed_config": [{}],
    "dtype": ["float16", "float64", 16],
    "embd_pdrop": [0, 0.1],
    "eos_token_id": [0, [5, 6], -1],
    "experts_implementation": ["eager", 3],
    "full_attention_interval": [1, 3, 0, "2"],
    "fusion_config": [{}, {"norm": True}],
    "gradient_checkpointing": [True],
    "head_dim": [8, 12, 7],
    "hidden_act": ["swish", "gelu", "SiLU"],
    "hidden_size": [64.0, 72],
    "id2label": [{"0": "a"}, ["a"]],
    "init_std": [1],
    "initializer_factor": [2.0],
    "initializer_range": [0, 1, "wide"],
    "intermediate_size": [1, "112"],
    "is_causal": [True, False, 1],
    "is_encoder_decoder": [True],
    "label2id": [{"a": 0}],
    "layer_types": [
        *(["full_attention"] * 2, ["attention"] * 2, ["sliding_attention"] * 2, ["full_attention"]),
        *(["linear_attention"] * 2, ["full_attention", "linear_attention"], []),
    ],
    "linear_conv_kernel_dim": [1, 2, 0],
    "linear_key_head_dim": [8, 0, 12.0],
    "linear_num_key_heads": [1, 4, 3, 0],
    "linear_num_value_heads": [2, 6, 3],
    "linear_value_head_dim": [8, "20"],
    "max_position_embeddings": [10, 20.0],
    "max_window_layers": [0, 1],
    "mlp_bias": [True, False],
    "mlp_only_layers": [[], [1], [-1], [7], ["1"]],
    "model_type": ["llama", "mistral"],
    "moe_intermediate_size": [8, 8.0],
    "name_or_path": ["/other"],
    "norm_topk_prob": [False, 1],
    "num_attention_heads": [4, 8, "8"],
    "num_experts": [2, 0],
    "num_experts_per_tok": [4, 5],
    "num_hidden_layers": [1, 3, 2.0],
    "num_key_value_heads": [1, 4, 8, 3],
    "num_labels": [3, 10**30],
    "num_local_experts": [2, 4],
    "original_max_position_embeddings": [16, 20, 1, 0],
    "output_attentions": [True],
    "output_hidden_states": [True],
    "output_router_logits": [True],
    "pad_token_id": [5, -1, 131],
    "partial_rotary_factor": [0.5, 1, 0.3, 0],
    "per_layer_config": [{}, {"0": {"intermediate_size": 50}}, {"1": {"rms_norm_eps": 0.1}}],
    "pretraining_tp": [2],
    "problem_type": ["regression"],
    "qkv_bias": [True, False],
    "quantization_config": [{}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, {"bits": 4}],
    "resid_pdrop": [0, 0.1],
    "return_dict": [False],
    "rms_norm_eps": [0.1, 1, {"__float__": "Infinity"}],
    "rope_parameters": [
        *({}, PLAIN, {"rope_theta": 50}, {**PLAIN, "rope_theta": None}, {**PLAIN, "rope_theta": "10000"}),
        *(
            {**PLAIN, "type": "linear"},
            {"full_attention": PLAIN},
            {**PLAIN, "partial_rotary_factor": 0.5},
            {**PLAIN, "a": 1},
            {**PLAIN, "partial_rotary_factor": 0},
            {**PLAIN, "partial_rotary_factor": None},
        ),
        *(
            LINEAR,
            YARN,
            LLAMA3_SCALING,
            {**LLAMA3_SCALING, "factor": 1},
            {**PLAIN, "rope_type": "dynamic", "factor": 2.0},
        ),
    ],
    "rope_scaling": [
        PLAIN,
        {"type": "linear", "factor": 2.0},
        {"type": "su"},
        {"factor": 2.0},
        {**YARN, "rope_theta": 50},
    ],
    "rope_theta": [50, 1e6, "1e4"],
    "router_aux_loss_coef": [0.5],
    "sep_token_id": [3],
    "shared_expert_intermediate_size": [0, 32],
    "sliding_window": [8, 26, 4096, 8.0],
    "text_config": [{}, {"hidden_size": 32}],
    "tie_word_embeddings": [True, False, "true"],
    "torch_dtype": ["float16", "float"],
    "transformers_version": ["4.0.0"],
    "transformers_weights": ["model.safetensors", "other.safetensors"],
    "use_cache": [False],
    "use_sliding_window": [True, False],
    "vocab_size": [140, 131.0],
}
# Further values, for the nights.
STRANGE: list[Any] = [True, False, 0, -1, 1, 1.5, 10**30, "", "text", "1", [], [0], ["a"], {}, {"a": 1}]
# Keys whose text names a kernel. Other machines may have other kernels, so that random texts are not tried.
NAMES_KERNELS = {"_attn_implementation", "attn_implementation", "experts_implementation"}


def config_class_of(family: str) -> Any:
    """Return the config class of the text model of a family."""
    return getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")


def keys_of_transformers(family: str) -> set[str]:
    """Return the keys of a config.json that the config class and the model of a family use in transformers."""
    config_class = config_class_of(family)
    keys = {field.name for field in dataclasses.fields(config_class)}
    keys |= set(config_class.attribute_map) | set(config_class.attribute_map.values())
    module = importlib.import_module(config_class.__module__.replace("configuration_", "modeling_"))
    for code in (module, importlib.import_module("transformers.masking_utils"), transformers.modeling_utils):
        keys |= _attributes_of_configs(code)
    for code in (transformers.PreTrainedConfig.__post_init__, RotaryEmbeddingConfigMixin, config_class.__post_init__):
        keys |= _keywords(code)
    return keys - NOT_IN_FILES - _of_images(family)


def _of_images(family: str) -> set[str]:
    """Return the keys that describe images alone. The same module of transformers has the text model."""
    if not hasattr(transformers, f"{family}VisionConfig"):
        return set()
    every = {"image_token_id", "video_token_id", "vision_config"}
    every |= {field.name for field in dataclasses.fields(getattr(transformers, f"{family}VisionConfig"))}
    return every - {field.name for field in dataclasses.fields(config_class_of(family))}


def keys_of_rope() -> set[str]:
    """Return the keys of `rope_parameters` in transformers."""
    return set(RopeParameters.__annotations__)


def _attributes_of_configs(code: Any) -> set[str]:
    """Return the names that code takes from an object called `config`."""
    found = set()
    for node in ast.walk(ast.parse(inspect.getsource(code))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in _CONFIG:
            found.add(node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            source, name, *_ = node.args
            found |= {name.value} if ast.unparse(source) in _CONFIG and isinstance(name, ast.Constant) else set()
    return found


def _keywords(code: Any) -> set[str]:
    """Return the keys that code takes from the remaining keys of a config.json."""
    calls = [
        node for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(code)))) if isinstance(node, ast.Call)
    ]
    return {
        node.args[0].value
        for node in calls
        if ast.unparse(node.func) in ("kwargs.pop", "kwargs.get") and isinstance(node.args[0], ast.Constant)
    }
