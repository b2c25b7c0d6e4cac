"""Read the Gated DeltaNet layers of a `config.json` (Qwen3-Next, Qwen3.5)."""

from __future__ import annotations

from typing import Any

from megatron_oprd.hf.checks import check_integers
from megatron_oprd.model_spec import DeltaNet
from megatron_oprd.types import UserError

SIZES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
SHARED_EXPERT = "shared_expert_intermediate_size"
INTERVAL = "full_attention_interval"
LINEAR = "linear_attention"
_PARTIAL_ROTARY = 0.25  # transformers has this default in the code of the class, not among its fields


def with_hybrid_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a config.json with the defaults that transformers computes from other fields."""
    if values.get("layer_types") is None:
        interval = values.get(INTERVAL, 4)
        layers = values.get("num_hidden_layers")
        if type(interval) is int and interval > 0 and type(layers) is int:
            types = ["full_attention" if (n + 1) % interval == 0 else LINEAR for n in range(layers)]
            values = {**values, "layer_types": types}
    # A model without dense blocks has no width for them; that of the shared expert takes its place.
    dense = {"intermediate_size": values[SHARED_EXPERT]} if values.get(SHARED_EXPERT) else {}
    return {"partial_rotary_factor": _PARTIAL_ROTARY, "norm_topk_prob": True, **dense, **values}


def hybrid_fields(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the ModelSpec fields of a model with Gated DeltaNet layers.

    Raises:
        UserError: a value is missing, invalid or not supported.
    """
    check_integers(values, SIZES, where)
    key_heads, value_heads, key_dim, value_dim, kernel = (values[key] for key in SIZES)
    if value_heads % key_heads:
        raise UserError(
            f"{where}: linear_num_value_heads={value_heads} is not a multiple of linear_num_key_heads={key_heads}; use "
            "the config.json of these weights"
        )
    types = values.get("layer_types")
    if not isinstance(types, list) or len(types) != values["num_hidden_layers"]:
        raise UserError(
            f"{where}: layer_types must be a list of {values['num_hidden_layers']} types, one for each layer; use the "
            "config.json of these weights"
        )
    if values.get("attn_output_gate") is False:
        raise UserError(f"{where} asks for attn_output_gate false, which is not supported; use a model without it")
    return {
        "delta_net": DeltaNet(key_heads, value_heads, key_dim, value_dim, kernel),
        "linear_layers": tuple(layer for layer, kind in enumerate(types) if kind == LINEAR),
        "output_gate": True,
        "zero_centered_norms": True,
    }
