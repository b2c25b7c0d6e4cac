"""Read which layers of a `config.json` have experts, and which have a sliding window."""

from __future__ import annotations

from typing import Any

from megatron_oprd.hf.checks import check_integers
from megatron_oprd.hf.families import SHARED_EXPERT, Family
from megatron_oprd.types import UserError


def expert_fields(values: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the ModelSpec fields of a mixture of experts; an empty dictionary if every layer is dense.

    `where` is the path of the config.json, for messages. Raises UserError for values that contradict each other.
    """
    # transformers 5 writes num_local_experts and accepts both names.
    key = "num_local_experts" if "num_local_experts" in values else "num_experts"
    # Qwen3.5-MoE has experts in every layer; the other families are dense models without experts.
    check_integers(values, (key,), where, least=int(family.model_type.startswith("qwen3_5_moe")))
    if values.get("num_experts", values[key]) != values[key]:
        raise UserError(
            f"{where}: num_experts={values['num_experts']!r} contradicts {key}={values[key]}; remove the wrong one"
        )
    step, dense = values.get("decoder_sparse_step") or 1, values.get("mlp_only_layers") or ()
    sparse = tuple(n for n in range(values["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0)
    if not values[key] or not sparse:
        return {}
    shared = (SHARED_EXPERT,) if family.shared_expert else ()
    check_integers(values, ("moe_intermediate_size", "num_experts_per_tok", *shared), where)
    if values["num_experts_per_tok"] > values[key]:
        raise UserError(
            f"{where}: num_experts_per_tok={values['num_experts_per_tok']} exceeds {key}={values[key]}; use the "
            "config.json of these weights"
        )
    if values["num_experts_per_tok"] == 1 and values.get("norm_topk_prob"):
        # A single normalised probability is always 1, so the router has no effect. Megatron refuses it, too.
        raise UserError(f"{where}: norm_topk_prob=true with num_experts_per_tok=1 is not supported; use another model")
    return {
        "num_experts": values[key],
        "experts_per_token": values["num_experts_per_tok"],
        "moe_ffn_hidden_size": values["moe_intermediate_size"],
        "shared_ffn_hidden_size": values[SHARED_EXPERT] if family.shared_expert else 0,
        "norm_topk_prob": values.get("norm_topk_prob") or False,
        "sparse_layers": sparse,
    }


def window_fields(values: dict[str, Any], family: Family, positions: int, where: str) -> dict[str, Any]:
    """Return the ModelSpec fields of the sliding windows; an empty dictionary if none is shorter than `positions`.

    `where` is the path of the config.json, for messages. Raises UserError for values that contradict each other.
    """
    layers, types = range(values["num_hidden_layers"]), values.get("layer_types")
    slides = family.always_slides or (family.layer_types and values.get("use_sliding_window"))
    window = values.get("sliding_window") if slides else None
    if window is None:
        if "sliding_attention" in (types or ()):
            raise UserError(
                f"{where}: layer_types names sliding_attention, but the model has no window; set use_sliding_window to "
                "true and sliding_window to a number of tokens, or use full_attention"
            )
        return {}
    check_integers(values, ("sliding_window",), where)
    if family.always_slides:
        windowed = tuple(layers)
    elif types is None:
        check_integers(values, ("max_window_layers",), where, least=0)
        windowed = tuple(layers[values["max_window_layers"] :])
    elif len(types) != len(layers):
        raise UserError(f"{where}: layer_types has {len(types)} entries for {len(layers)} layers; correct it")
    else:
        windowed = tuple(layer for layer in layers if types[layer] == "sliding_attention")
    return {"sliding_window": window, "windowed_layers": windowed} if windowed and window < positions else {}
