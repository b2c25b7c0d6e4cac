"""What a Hugging Face folder's `config.json` asks for, or a refusal that names what we do not support."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_oprd.types import ModelSpec, UserError

QKV_BIAS = ("Qwen2ForCausalLM",)
EXPERTS = ("Qwen3MoeForCausalLM",)
ARCHITECTURES = (*QKV_BIAS, "Qwen3ForCausalLM", *EXPERTS)
WHOLE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
OPTIONAL_WHOLE = ("num_key_value_heads", "head_dim", "decoder_sparse_step")
SHARED_EXPERTS = ("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts")


def read_model_spec(path: str | Path) -> ModelSpec:
    """The model of a Hugging Face folder. Raises UserError, naming file, key and value, for a broken config or for
    anything in it that would be ignored: rope scaling, sliding windows, quantisation, shared experts, other
    architectures."""
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder with a Hugging Face model")
    values = read_json(folder / "config.json")
    where = str(folder / "config.json")
    _check_types(values, where)
    architecture = next(iter(values.get("architectures") or ["none"]))
    if architecture not in ARCHITECTURES:
        raise UserError(f"{where}: architecture {architecture} is not supported; use one of {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(values, architecture, where)
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    return ModelSpec(
        architecture=architecture,
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        vocab_size=values["vocab_size"],
        norm_epsilon=values["rms_norm_eps"],
        rope_theta=_rope(values).get("rope_theta") or values.get("rope_theta") or 10000.0,
        max_position_embeddings=values["max_position_embeddings"],
        tied_embeddings=values.get("tie_word_embeddings", False),
        qkv_bias=architecture in QKV_BIAS,
        qk_norm=architecture not in QKV_BIAS,
        **(_expert_fields(values, where) if architecture in EXPERTS else {}),
        eos_token_ids=_eos_token_ids(folder, values),
        hf_config=values,
    )


def _expert_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of a mixture of experts, or none when every layer is dense all the same."""
    # transformers 5 calls it num_local_experts and reads either name.
    key = "num_local_experts" if "num_local_experts" in values else "num_experts"
    _check_whole(values, (key,), where, least=0)
    if values.get("num_experts", values[key]) != values[key]:
        raise UserError(f"{where}: num_experts={values['num_experts']!r} contradicts {key}={values[key]}")
    step, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or ()
    sparse = tuple(n for n in range(values["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0)
    if not values[key] or not sparse:
        return {}
    _check_whole(values, ("moe_intermediate_size", "num_experts_per_tok"), where)
    if values["num_experts_per_tok"] > values[key]:
        raise UserError(f"{where}: num_experts_per_tok={values['num_experts_per_tok']} exceeds {key}={values[key]}")
    if values["num_experts_per_tok"] == 1 and values.get("norm_topk_prob"):
        # The one probability would be 1 whatever the router says; Megatron refuses it, too.
        raise UserError(f"{where}: norm_topk_prob=true with num_experts_per_tok=1 is not supported")
    return {
        "num_experts": values[key],
        "experts_per_token": values["num_experts_per_tok"],
        "moe_ffn_hidden_size": values["moe_intermediate_size"],
        "norm_topk_prob": values.get("norm_topk_prob") or False,
        "sparse_layers": sparse,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # what is not UTF-8, not JSON, or nested too deeply
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def _check_types(values: dict[str, Any], where: str) -> None:
    _check_whole(values, (*WHOLE, *(key for key in OPTIONAL_WHOLE if values.get(key) is not None)), where)
    if type(values.get("rms_norm_eps")) not in (int, float) or values["rms_norm_eps"] <= 0:
        raise UserError(f"{where}: rms_norm_eps={values.get('rms_norm_eps')!r} must be a positive number")
    for key, kind in (
        ("architectures", list),
        ("layer_types", list),
        ("rope_parameters", dict),
        ("rope_scaling", dict),
        ("tie_word_embeddings", bool),
        ("mlp_only_layers", list),
        ("norm_topk_prob", bool),
    ):
        value = values.get(key)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{where}: {key}={value!r} must be a {kind.__name__}")
    if any(type(layer) is not int for layer in values.get("mlp_only_layers") or ()):
        raise UserError(f"{where}: mlp_only_layers={values['mlp_only_layers']!r} must hold whole numbers")
    theta = _rope(values).get("rope_theta") or values.get("rope_theta")
    if theta is not None and (type(theta) not in (int, float) or theta <= 0):
        raise UserError(f"{where}: rope_theta={theta!r} must be a positive number")


def _check_whole(values: dict[str, Any], keys: Iterable[str], where: str, least: int = 1) -> None:
    for key in keys:
        value = values.get(key)
        if type(value) is not int or value < least:  # True is an int, too
            positive = "positive" if least else "non-negative"
            raise UserError(f"{where}: {key}={value!r} must be a {positive} whole number")


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters`, earlier versions `rope_scaling` beside a top-level `rope_theta`."""
    return values.get("rope_parameters") or values.get("rope_scaling") or {}


def _refuse_unsupported(values: dict[str, Any], architecture: str, where: str) -> None:
    rope = _rope(values)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    layer_types = set(values.get("layer_types") or ())
    qkv_bias = values.get("attention_bias", False)
    unsupported = {
        f"rope scaling of type {rope_type}": rope_type != "default",
        "use_sliding_window": bool(values.get("use_sliding_window")),
        f"layer_types {sorted(layer_types)}": bool(layer_types - {"full_attention"}),
        f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
        "quantization_config": bool(values.get("quantization_config")),
        "attention_bias": architecture not in QKV_BIAS and bool(qkv_bias),
        **{key: bool(values.get(key)) for key in SHARED_EXPERTS},
        f"attention_dropout {values.get('attention_dropout')}": bool(values.get("attention_dropout")),
    }
    for name, asked in unsupported.items():
        if asked:
            raise UserError(f"{where} asks for {name}, which is not supported")


def _eos_token_ids(folder: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Every id that ends a response: `generation_config.json` lists several for Qwen, `config.json` has one."""
    generation = folder / "generation_config.json"
    found = read_json(generation).get("eos_token_id") if generation.exists() else None
    found = values.get("eos_token_id") if found is None else found
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(token) is not int for token in ids):
        raise UserError(f"{folder}: eos_token_id={found!r} must be a whole number or a list of them")
    return tuple(ids)
