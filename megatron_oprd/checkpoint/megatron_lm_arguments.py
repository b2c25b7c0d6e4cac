"""Read the model's shape from the arguments that Megatron-LM and Megatron-Bridge store in a checkpoint.

Megatron-LM stores its arguments as `args` in `common.pt`, later versions among the tensors as `common_state`.
Megatron-Bridge writes `run_config.yaml`. Both are translated to the names of Megatron-Core's TransformerConfig and
GPTModel. A setting that this package does not compute in the same way is refused by name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.checkpoint.metadata import Metadata

from megatron_oprd.checkpoint.inert_pickle import Placeholder, read_saved
from megatron_oprd.checkpoint.stored_index import COPY_AGAIN
from megatron_oprd.model_spec import Llama3Scaling, ModelSpec
from megatron_oprd.types import UserError

COMMON = "common.pt"
COMMON_STATE = "common_state"
RUN_CONFIG = "run_config.yaml"

# Arguments of Megatron-LM that have another name in Megatron-Core.
_RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "num_experts": "num_moe_experts",
    "use_rope_scaling": "rope_scaling",
    "apply_layernorm_1p": "layernorm_zero_centered_gamma",
    "rotary_seq_len_interpolation_factor": "seq_len_interpolation_factor",
}
# The only supported value of each setting that changes what a model computes. A missing setting has this value.
_SUPPORTED: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "rotary_interleaved": False,
    "seq_len_interpolation_factor": None,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_latent_attention": False,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "softmax_scale": None,
    "softmax_type": "vanilla",
    "window_size": None,
    "no_rope_freq": None,
    "experimental_attention_variant": None,
    "linear_attention_type": None,
    "is_hybrid_model": False,
    "hybrid_layer_pattern": None,
    "hybrid_override_pattern": None,
    "heterogeneous_block_specs": False,
    "heterogeneous_layers_config_path": None,
    "squared_relu": False,
    "quick_geglu": False,
    "glu_linear_offset": 0.0,
    "activation_func_clamp_value": None,
    "use_mup": False,
    "enable_hyper_connections": False,
    "enable_mhc_connections": False,
    "mtp_num_layers": None,
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_router_topk_scaling_factor": None,
    "moe_router_num_groups": None,
    "moe_router_group_topk": None,
    "moe_expert_capacity_factor": None,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "moe_mlp_glu_interleave_size": None,
}
_SILU = ("silu", "torch.nn.functional.silu", "torch.nn.modules.activation.SiLU")
_INTEGERS = ("num_layers", "hidden_size", "num_attention_heads")
# Constants of Megatron-Core's rope_scaling, which has the factor as its only argument.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_LLAMA3_FACTOR = 8.0


@dataclass(frozen=True)
class ModelArguments:
    """The arguments of a model under Megatron-Core's names."""

    values: Mapping[str, Any]
    file: Path  # file that contains them, for error messages

    def shape(self) -> dict[str, Any]:
        """Return the fields of a ModelSpec that the arguments determine, in the form of ModelSpec.

        Raises UserError, with file and argument, for an unsupported setting and for a missing or invalid value.
        """
        self._refuse_unsupported()
        values = self.values
        for name in _INTEGERS:
            if type(values.get(name)) is not int or values[name] < 1:
                raise UserError(f"{self.file}: {name}={values.get(name)!r} must be a positive whole number")
        heads = values["num_attention_heads"]
        head_dim = values.get("kv_channels") or values["hidden_size"] // heads
        layers = tuple(range(values["num_layers"]))
        experts = values.get("num_moe_experts") or 0
        sparse = self._sparse_layers() if experts else ()
        ffn = values.get("ffn_hidden_size")
        shape = {
            "num_layers": values["num_layers"],
            "hidden_size": values["hidden_size"],
            "ffn_hidden_size": ffn if sparse != layers else None,
            "num_attention_heads": heads,
            "num_query_groups": values.get("num_query_groups") or heads,
            "head_dim": head_dim,
            "norm_epsilon": values.get("layernorm_epsilon", 1e-5),
            "rope_theta": values.get("rotary_base", 10000),
            "rotary_dim": int(head_dim * values.get("rotary_percent", 1.0)),
            "rope_scaling": self._rope_scaling(),
            "tied_embeddings": bool(values.get("share_embeddings_and_output_weights", True)),
            "qkv_bias": bool(values.get("add_qkv_bias", False)),
            "qk_norm": bool(values.get("qk_layernorm", False)),
            "windowed_layers": (),  # window_size is refused
            "num_experts": experts,
            "sparse_layers": sparse,
        }
        if experts:
            shape["experts_per_token"] = values.get("moe_router_topk", 2)
            shape["moe_ffn_hidden_size"] = values.get("moe_ffn_hidden_size") or ffn
            shape["norm_topk_prob"] = not values.get("moe_router_pre_softmax", False)
            shape["shared_ffn_hidden_size"] = values.get("moe_shared_expert_intermediate_size") or 0
        return {name: value for name, value in shape.items() if name == "rope_scaling" or value is not None}

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError if the arguments contradict the model of the config.json that the user named."""
        for name, value in self.shape().items():
            if getattr(spec, name) != value:
                raise UserError(
                    f"{self.file}: the arguments give {name}={value!r}, but config.json gives {getattr(spec, name)!r}; "
                    "name the Hugging Face folder of this model"
                )

    def hf_config(self, padded_vocabulary: int) -> dict[str, Any]:
        """Return the content of a config.json for a model that has none.

        The family is the one with the same norms and biases. The vocabulary is the padded one: Megatron-LM computes
        logits of the padding, too. Raises UserError if no family has these norms and biases.
        """
        shape = self.shape()
        if shape["rotary_dim"] != shape["head_dim"]:
            raise UserError(f"{self.file}: rotary_percent={self.values['rotary_percent']} is not supported; use 1.0")
        scaling = shape["rope_scaling"]
        rope = {"rope_type": "default", "rope_theta": float(shape["rope_theta"])}
        if scaling is not None:
            rope |= {"rope_type": "llama3", "factor": scaling.factor, **_LLAMA3}
        architecture, model_type = self._family(shape)
        config = {
            "architectures": [architecture],
            "model_type": model_type,
            "hidden_act": "silu",
            "num_hidden_layers": shape["num_layers"],
            "hidden_size": shape["hidden_size"],
            "intermediate_size": shape.get("ffn_hidden_size") or self.values.get("ffn_hidden_size"),
            "num_attention_heads": shape["num_attention_heads"],
            "num_key_value_heads": shape["num_query_groups"],
            "head_dim": shape["head_dim"],
            "vocab_size": padded_vocabulary,
            "rms_norm_eps": shape["norm_epsilon"],
            "rope_parameters": rope,
            "max_position_embeddings": self.values.get("max_positions"),
            "tie_word_embeddings": shape["tied_embeddings"],
        }
        if shape["num_experts"]:
            dense = [layer for layer in range(shape["num_layers"]) if layer not in shape["sparse_layers"]]
            config |= {
                "num_experts": shape["num_experts"],
                "num_experts_per_tok": shape["experts_per_token"],
                "moe_intermediate_size": shape["moe_ffn_hidden_size"],
                "norm_topk_prob": shape["norm_topk_prob"],
                "decoder_sparse_step": 1,
                "mlp_only_layers": dense,
            }
            if shape["shared_ffn_hidden_size"]:
                config["shared_expert_intermediate_size"] = shape["shared_ffn_hidden_size"]
        return config

    def _refuse_unsupported(self) -> None:
        values = self.values
        for name, supported in _SUPPORTED.items():
            value = values.get(name, supported)
            if value != supported and not (supported in (None, 0.0, False) and not value):
                raise UserError(f"{self.file}: {name}={_shown(value)} is not supported; supported: {supported!r}")
        if values.get("moe_shared_expert_intermediate_size") and not values.get("moe_shared_expert_gate"):
            raise UserError(
                f"{self.file}: a shared expert without moe_shared_expert_gate is not supported; use another model"
            )
        activation = values.get("activation_func")
        if activation is not None and _target(activation) not in _SILU:
            raise UserError(f"{self.file}: activation_func={_shown(activation)} is not supported; supported: silu")

    def _sparse_layers(self) -> tuple[int, ...]:
        frequency, number = self.values.get("moe_layer_freq", 1), self.values["num_layers"]
        if type(frequency) is int and frequency >= 1:
            return tuple(range(0, number, frequency))
        if isinstance(frequency, list) and len(frequency) == number:
            return tuple(layer for layer, has_experts in enumerate(frequency) if has_experts)
        raise UserError(
            f"{self.file}: moe_layer_freq={frequency!r} must be a whole number or a list of {number} numbers"
        )

    def _rope_scaling(self) -> Llama3Scaling | None:
        if not self.values.get("rope_scaling"):
            return None
        factor = float(self.values.get("rope_scaling_factor") or _LLAMA3_FACTOR)
        return Llama3Scaling(factor, *_LLAMA3.values())  # type: ignore[arg-type]

    def _family(self, shape: Mapping[str, Any]) -> tuple[str, str]:
        """Return the architecture and model_type with the same norms and biases. Raises UserError if there is none."""
        families = {
            (False, False, True, False): ("Qwen2ForCausalLM", "qwen2"),
            (False, False, False, True): ("Qwen3ForCausalLM", "qwen3"),
            (False, False, False, False): ("LlamaForCausalLM", "llama"),
            (True, True, True, False): ("Qwen2MoeForCausalLM", "qwen2_moe"),
            (True, False, False, True): ("Qwen3MoeForCausalLM", "qwen3_moe"),
        }
        shared = bool(shape.get("shared_ffn_hidden_size"))
        key = bool(shape["num_experts"]), shared, shape["qkv_bias"], shape["qk_norm"]
        if key not in families:
            raise UserError(
                f"{self.file}: no supported family has num_experts={shape['num_experts']}, "
                f"{'a' if shared else 'no'} shared expert, add_qkv_bias={shape['qkv_bias']} and "
                f"qk_layernorm={shape['qk_norm']}; use a model with the norms and biases of Qwen2, Qwen3 or Llama"
            )
        family = families[key]
        if family[0] != "LlamaForCausalLM" and shape["rope_scaling"] is not None:
            raise UserError(
                f"{self.file}: use_rope_scaling is supported without add_qkv_bias and qk_layernorm; use another model"
            )
        return family


def read_arguments(folder: Path, index: Metadata) -> ModelArguments | None:
    """Return the arguments in a checkpoint, or None if the checkpoint stores none.

    No code that the files may contain is run. Raises UserError, with the file, for damaged files.
    """
    path = folder / RUN_CONFIG
    if path.exists():
        return ModelArguments(_from_run_config(path), path)
    path, state = _common_state(folder, index)
    arguments = state.get("args") if isinstance(state, dict) else None
    if not isinstance(arguments, Placeholder) or not arguments.state:
        return None
    return ModelArguments(_from_megatron_lm(arguments.state), path)


def _from_run_config(path: Path) -> dict[str, Any]:
    """Return the section `model` of Megatron-Bridge's file. Classes in it are texts, and none is imported."""
    try:
        content = yaml.safe_load(path.read_text())
        model = content["model"]
        values = {**model, **(model.get("transformer") or {})}  # later versions nest the transformer's settings
    except Exception as error:  # damaged YAML, or another structure
        raise UserError(f"{path} is no run_config.yaml of Megatron-Bridge: {_line(error)}; {COPY_AGAIN}") from None
    values.setdefault("max_positions", values.get("max_position_embeddings") or values.get("seq_length"))
    return values


def _common_state(folder: Path, index: Metadata) -> tuple[Path, Any]:
    """Return the file of the unsharded state, and the state with placeholders for everything that is not plain data."""
    path, start, length = folder / COMMON, 0, -1
    for place, stored in index.storage_data.items():
        if place.fqn.split("/")[0] == COMMON_STATE and not (folder / COMMON).exists():
            path, start, length = folder / stored.relative_path, stored.offset, stored.length
    if not path.exists():
        return path, None
    try:
        with path.open("rb") as file:
            file.seek(start)
            state = read_saved(io.BytesIO(file.read(length)))
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path} is truncated or corrupt: {_line(error)}; {COPY_AGAIN}") from None
    return path, state[0] if isinstance(state, list) and len(state) == 1 else state


def _from_megatron_lm(arguments: Mapping[str, Any]) -> dict[str, Any]:
    values = {_RENAMED.get(name, name): value for name, value in arguments.items() if value is not None}
    # Three arguments of Megatron-LM are the opposite of, or a condition for, Megatron-Core's setting.
    values["share_embeddings_and_output_weights"] = not arguments.get("untie_embeddings_and_output_weights", False)
    if not arguments.get("group_query_attention", True):
        values["num_query_groups"] = None
    positions = arguments.get("max_position_embeddings") or arguments.get("seq_length")
    return {**values, "max_positions": positions, "gated_linear_unit": bool(arguments.get("swiglu", False))}


def _target(value: Any) -> Any:
    """Return the name of a function in run_config.yaml: a text, or a dictionary with `_target_`."""
    return value.get("_target_") if isinstance(value, dict) else value


def _shown(value: Any) -> str:
    return value.origin if isinstance(value, Placeholder) else repr(_target(value))


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
