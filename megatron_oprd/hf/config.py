"""Read the `config.json` of a Hugging Face folder. A config with an unsupported feature is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_oprd.hf import hybrid
from megatron_oprd.hf.checks import check_integers, check_positive
from megatron_oprd.hf.experts import stores_fused_experts
from megatron_oprd.hf.families import FAMILIES, SHARED_EXPERT, Family
from megatron_oprd.hf.fp8 import weight_block_size
from megatron_oprd.hf.hybrid import hybrid_fields, with_hybrid_defaults
from megatron_oprd.hf.layer_fields import expert_fields, window_fields
from megatron_oprd.hf.other_keys import refuse_other_models
from megatron_oprd.hf.rope import rope_fields
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.runtime.files import check_model_folder, read_json
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

INTEGERS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
OPTIONAL_INTEGERS = ("num_key_value_heads", "head_dim", "decoder_sparse_step")
DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
# Fields that a config.json may leave out. Their defaults are those of the family's config class in transformers.
DEFAULTED = (
    *INTEGERS,
    *OPTIONAL_INTEGERS,
    "rms_norm_eps",
    "tie_word_embeddings",
    "hidden_act",
    "eos_token_id",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "mlp_only_layers",
    *hybrid.SIZES,
)
ADAPTER = "adapter_config.json"
SHARED_EXPERTS = (SHARED_EXPERT, "n_shared_experts", "num_shared_experts")


def read_model_spec(path: str | Path) -> ModelSpec:
    """Read the model specification of a Hugging Face folder.

    Raises:
        UserError: the config is invalid or asks for an unsupported feature (some kinds of rope scaling, quantisation or
            window, architecture). Names file, key and value.
    """
    folder = Path(path)
    check_model_folder(folder)
    if (folder / ADAPTER).exists():  # transformers then loads the weights of another folder and the adapter
        raise UserError(
            f"{folder} holds an adapter ({ADAPTER}); merge it into its model (merge_and_unload, then save_pretrained) "
            "and use the merged model"
        )
    written = read_json(folder / "config.json")
    where = str(folder / "config.json")
    architecture = _architecture(written, where)
    family = FAMILIES[architecture]
    described = _text_config(written, where) if family.text_config else written
    values = _with_defaults(described, family, architecture)
    _check_types(values, where)
    _refuse_unsupported(values, family, where)
    refuse_other_models({**written, "text_config": None, **described} if family.text_config else written, where)
    heads = values["num_attention_heads"]
    head_dim = values.get("head_dim") or values["hidden_size"] // heads
    rope = rope_fields(values, head_dim, family.rope_types, family.partial_rotary, where)
    spec = ModelSpec(
        architecture=architecture,
        num_layers=values["num_hidden_layers"],
        hidden_size=values["hidden_size"],
        ffn_hidden_size=values["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=_query_groups(values, where),
        head_dim=head_dim,
        vocab_size=values["vocab_size"],
        norm_epsilon=values["rms_norm_eps"],
        **rope,
        tied_embeddings=values.get("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        **(expert_fields(values, family, where) if family.experts else {}),
        **(hybrid_fields(values, where) if family.hybrid else {}),
        text_tower=family.text_config,
        **window_fields(values, family, rope["max_position_embeddings"], where),
        fused_experts=family.experts and stores_fused_experts(folder),
        eos_token_ids=_eos_token_ids(folder, values),
        hf_config={
            **{key: value for key, value in written.items() if key != "quantization_config"},
            "architectures": [architecture, *(written.get("architectures") or [])[1:]],  # not a model without LM head
        },
    )
    _check_with_transformers(
        {**described, "vocab_size": spec.vocab_size}, _config_class(family, architecture), where
    )  # last, because the messages of this file are clearer
    return spec


def _query_groups(values: dict[str, Any], where: str) -> int:
    heads = values["num_attention_heads"]
    groups = values.get("num_key_value_heads") or heads
    if heads % groups:
        raise UserError(
            f"{where}: num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}; use the "
            "config.json of these weights"
        )
    return groups


def _architecture(values: dict[str, Any], where: str) -> str:
    """Return the architecture that transformers builds with an LM head: that of `model_type`.

    Raises UserError if it is not supported or if `architectures` names another one. A model that was saved without LM
    head has the same name with `Model` at the end.
    """
    named = values.get("architectures") or []
    if not isinstance(named, list):
        raise UserError(f"{where}: architectures={named!r} must be a list")
    by_type = {family.model_type: name for name, family in FAMILIES.items()}
    model_type = values.get("model_type")
    built = by_type.get(model_type) if isinstance(model_type, str) else None
    first = named[0] if named else built or f"of model_type={model_type!r}"
    architecture = re.sub("Model$", "ForCausalLM", first) if isinstance(first, str) else first
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(f"{where}: architecture {first} is not supported; use one of {', '.join(FAMILIES)}")
    if built != architecture:
        raise UserError(
            f"{where}: model_type={model_type!r}, by which transformers chooses the model, does not belong to {first}; "
            f"if the weights are of {first}, set model_type to {FAMILIES[architecture].model_type!r}"
        )
    return architecture


def _text_config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the config of the text tower. Tied embeddings and the end of an answer may stand beside it."""
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}: text_config={text!r} must be a dict; use the config.json of these weights")
    outer = {key: values[key] for key in ("tie_word_embeddings", "quantization_config") if key in values}
    ends = {"eos_token_id": values["eos_token_id"]} if values.get("eos_token_id") is not None else {}
    return {**text, **ends, **outer}


def _with_defaults(values: dict[str, Any], family: Family, architecture: str) -> dict[str, Any]:
    """Return the values of a config.json with the defaults that transformers has for the fields left out.

    Some defaults depend on other fields: Llama's `num_key_value_heads` is `num_attention_heads`.
    """
    try:
        complete = _config_class(family, architecture)(**{key: values[key] for key in DEFAULTED if key in values})
    except Exception:  # an invalid value, which the checks after this name
        return values
    present = {*values, *(["num_experts"] if "num_local_experts" in values else [])}  # two names of one field
    defaults = {key: getattr(complete, key, None) for key in DEFAULTED if key not in present}
    values = {**values, **{key: value for key, value in defaults.items() if value is not None}}
    return with_hybrid_defaults(values) if family.hybrid else values


def _check_with_transformers(values: dict[str, Any], config_class: Any, where: str) -> None:
    """Raise UserError if the config class of transformers refuses a value, also of a key that has no effect here.

    Such a model could be trained, but transformers would not open the export.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # rope.py checks the rotary embedding: transformers 5 refuses some forms of it that transformers 4 wrote.
        rest = {key: value for key, value in values.items() if key not in ("rope_scaling", "rope_parameters")}
        config = config_class.from_dict(rest)
    except Exception as error:  # each version raises classes of its own
        raise UserError(f"{where}: transformers refuses it, correct it: {error_line(error, 300)}") from None
    finally:
        logging.set_verbosity(verbosity)
    if getattr(config, "head_dim", 0) is None:
        raise UserError(f"{where}: head_dim is null, with which transformers cannot compute; remove it")
    padding = getattr(config, "pad_token_id", None)
    if isinstance(padding, int) and not -values["vocab_size"] <= padding < values["vocab_size"]:
        raise UserError(
            f"{where}: pad_token_id={padding} is not in the vocabulary of {values['vocab_size']}; set it to null"
        )


def _config_class(family: Family, architecture: str) -> Any:
    import transformers

    return getattr(transformers, family.config_class or architecture.replace("ForCausalLM", "Config"))


def _check_types(values: dict[str, Any], where: str) -> None:
    check_integers(values, (*INTEGERS, *(key for key in OPTIONAL_INTEGERS if values.get(key) is not None)), where)
    check_positive(values, ("rms_norm_eps",), where)
    for key, kind in (
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


def _refuse_unsupported(values: dict[str, Any], family: Family, where: str) -> None:
    weight_block_size(values, where)
    optional = {"sliding_attention": family.layer_types, hybrid.LINEAR: family.hybrid}
    known = {"full_attention", *(name for name, supported in optional.items() if supported)}
    layer_types = set(map(str, values.get("layer_types") or ()))
    if values.get("sliding_window") is not None:
        check_integers(values, ("sliding_window",), where, least=int(family.always_slides))
    slides = family.layer_types or family.always_slides
    always_normalises = family.model_type.startswith("qwen3_5_moe")
    unsupported = {
        "use_sliding_window": not slides and bool(values.get("use_sliding_window")),
        f"layer_types {sorted(layer_types)}": bool(layer_types - known),
        f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") not in ("silu", "swish"),
        "attention_bias": not family.qkv_bias and bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        # transformers always normalises the probabilities of Qwen3.5's experts, whatever the key says.
        "norm_topk_prob false": always_normalises and values.get("norm_topk_prob") is False,
        "norm_topk_prob null": always_normalises and values.get("norm_topk_prob", True) is None,
        "qkv_bias false": family.qkv_bias and values.get("qkv_bias") is False,
        **{key: bool(values.get(key)) for key in SHARED_EXPERTS if not (family.shared_expert and key == SHARED_EXPERT)},
        **{f"{key} {values.get(key)}": bool(values.get(key)) for key in DROPOUTS},
    }
    for name, present in unsupported.items():
        if present:
            raise UserError(f"{where} asks for {name}, which is not supported; use a model without it")


def _eos_token_ids(folder: Path, values: dict[str, Any]) -> tuple[int, ...]:
    """Return the ids that end a response: those of `generation_config.json`, then further ones of `config.json`."""
    generation = folder / "generation_config.json"
    found = [read_json(generation).get("eos_token_id")] if generation.exists() else []
    ids: list[int] = []
    for value in (*found, values.get("eos_token_id")):
        several = value if isinstance(value, list) else [] if value is None else [value]
        if any(type(token) is not int or not 0 <= token < 2**31 for token in several):
            raise UserError(f"{folder}: eos_token_id={value!r} must be a token id, a list of them, or null")
        ids += several
    return tuple(dict.fromkeys(ids))
