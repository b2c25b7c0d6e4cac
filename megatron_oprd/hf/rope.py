"""Read the rotary position embedding of a `config.json`, with the rules of transformers."""

from __future__ import annotations

import math
from typing import Any

from megatron_oprd.hf.checks import check_integers, check_positive, is_positive
from megatron_oprd.model_spec import LinearScaling, Llama3Scaling, LongRope, RopeScaling, YarnScaling
from megatron_oprd.types import UserError

_NAMES = {"su": "longrope"}  # "su" is the name in the first Phi-3 configs
_ORIGINAL = "original_max_position_embeddings"
_REASONS = {
    "dynamic": "its angles change while a sequence grows, and transformers and vLLM compute them differently",
}


def rope_fields(
    values: dict[str, Any], head_dim: int, rope_types: tuple[str, ...], partial: bool, where: str
) -> dict[str, Any]:
    """Return the ModelSpec fields of the rotary embedding and of the positions that it reaches.

    Args:
        rope_types: types of rope scaling that the family supports, besides "default".
        partial: True if the family may rotate only a part of each head.
        where: file name for error messages.

    Raises:
        UserError: the type is not supported, or one of its values is missing or invalid.
    """
    # transformers 5 writes `rope_parameters`; earlier versions write `rope_scaling` and a top-level `rope_theta`. If
    # both are present, transformers uses `rope_scaling`.
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    kind = _NAMES.get(kind, kind) if isinstance(kind, str) else kind
    if kind not in ("default", *rope_types):
        reason = f" ({_REASONS[kind]})" if isinstance(kind, str) and kind in _REASONS else ""
        raise UserError(
            f"{where} asks for rope scaling of type {kind}, which is not supported{reason}; use a model with "
            f"{' or '.join(('default', *rope_types))}"
        )
    nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise UserError(f"{where} has a rotary embedding for {nested} alone, which is not supported; use another model")
    theta, rotary_dim = _theta_and_dim(values, rope, head_dim, partial, where)
    scaling: RopeScaling | None = None
    positions = values["max_position_embeddings"]
    if kind == "llama3":
        scaling = _llama3(values, rope, where)
    elif kind == "longrope":
        scaling = _longrope(values, rope, rotary_dim // 2, where)
    elif kind == "linear":
        check_positive(rope, ("factor",), where)
        scaling = LinearScaling(rope["factor"])
    elif kind == "yarn":
        scaling = _yarn(values, rope, theta, where)
        # Configs of Qwen keep the positions of pretraining in max_position_embeddings.
        positions = max(positions, int(scaling.original_positions * scaling.factor))
    return {
        "rope_theta": theta,
        "rotary_dim": rotary_dim,
        "rope_scaling": scaling,
        "max_position_embeddings": positions,
    }


def _theta_and_dim(
    values: dict[str, Any], rope: dict[str, Any], head_dim: int, partial: bool, where: str
) -> tuple[float, int]:
    """Return the base of the frequencies and the rotated dimensions of a head. Raises UserError for invalid ones."""
    # A null counts as a value: transformers computes with it and fails. Only a null that it never uses is no factor.
    factor = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if factor is None and not (partial and "partial_rotary_factor" in rope):
        factor = 1.0
    rotary = {
        "rope_theta": rope.get("rope_theta", values.get("rope_theta", 10000.0)),
        "partial_rotary_factor": factor,
    }
    check_positive(rotary, rotary, where)
    if factor != 1 and not partial:
        raise UserError(
            f"{where} asks for partial_rotary_factor {factor}, which is not supported; use a model without it"
        )
    rotary_dim = int(head_dim * factor)
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise UserError(
            f"{where}: partial_rotary_factor={factor} rotates {rotary_dim} of the {head_dim} dimensions of a head; "
            f"that must be an even number from 2 to {head_dim}"
        )
    return rotary["rope_theta"], rotary_dim


def _llama3(values: dict[str, Any], rope: dict[str, Any], where: str) -> Llama3Scaling:
    rope = {**rope, _ORIGINAL: values.get(_ORIGINAL, rope.get(_ORIGINAL))}  # the top-level key wins, even as null
    check_positive(rope, ("factor", "low_freq_factor", "high_freq_factor"), where)
    check_integers(rope, (_ORIGINAL,), where)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    if high <= low:
        raise UserError(f"{where}: high_freq_factor={high} must be larger than low_freq_factor={low}")
    return Llama3Scaling(rope["factor"], low, high, rope[_ORIGINAL])


def _yarn(values: dict[str, Any], rope: dict[str, Any], rope_theta: float, where: str) -> YarnScaling:
    if rope_theta <= 1:
        raise UserError(f"{where}: rope_theta={rope_theta} must be larger than 1 for rope scaling of type yarn")
    original = values.get(_ORIGINAL) or rope.get(_ORIGINAL) or values["max_position_embeddings"]
    check_integers({_ORIGINAL: original}, (_ORIGINAL,), where)
    if "factor" in rope and rope["factor"] is None:
        rope = {**rope, "factor": values["max_position_embeddings"] / original}
    # transformers treats 0 like a missing value.
    options = {"beta_fast": rope.get("beta_fast") or 32, "beta_slow": rope.get("beta_slow") or 1}
    options |= {key: rope[key] for key in ("mscale", "mscale_all_dim") if rope.get(key)}
    check_positive(rope, ("factor",), where)
    check_positive(options, options, where)
    fast, slow, factor = options["beta_fast"], options["beta_slow"], rope["factor"]
    if fast <= slow:
        raise UserError(f"{where}: beta_fast={fast} must be larger than beta_slow={slow}")
    if type(truncate := rope.get("truncate", True)) is not bool:
        raise UserError(f"{where}: truncate={truncate!r} must be true or false")
    attention = rope.get("attention_factor")
    if attention is None:
        attention = _attention_factor(factor)
        if "mscale" in options and "mscale_all_dim" in options:
            scales = (_attention_factor(factor, options[key]) for key in ("mscale", "mscale_all_dim"))
            attention = next(scales) / next(scales)
    check_positive({"attention_factor": attention}, ("attention_factor",), where)
    return YarnScaling(factor, original, attention, fast, slow, truncate)


def _attention_factor(factor: float, scale: float = 1) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(values: dict[str, Any], rope: dict[str, Any], frequencies: int, where: str) -> LongRope:
    # transformers uses only the top-level key. The value 1 would divide by log(1) = 0.
    check_integers(values, (_ORIGINAL,), where, least=2)
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if not isinstance(factors, list) or not all(map(is_positive, factors)) or len(factors) != frequencies:
            found = f"has {len(factors)} values" if isinstance(factors, list) else f"is {factors!r}"
            raise UserError(f"{where}: {key} {found}; it must be a list of {frequencies} positive numbers")
    original, scale = values[_ORIGINAL], rope.get("factor")
    scale = values["max_position_embeddings"] / original if scale is None else scale
    attention = rope.get("attention_factor")
    check_positive({"factor": scale}, ("factor",), where)
    if attention is None:
        attention = 1.0 if scale <= 1 else math.sqrt(1 + math.log(scale) / math.log(original))
    check_positive({"attention_factor": attention}, ("attention_factor",), where)
    return LongRope(tuple(rope["short_factor"]), tuple(rope["long_factor"]), original, attention)
