"""Refuse keys of a config.json with which transformers builds another model than the family's, or none that runs.

The rest of this package does not use these keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_oprd.types import UserError

# Sections that transformers takes for the config of a model inside of the model.
_INNER_MODELS = ("text_config", "text_encoder", "decoder", "generator")


def _names_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str | dict)


# For each key, the values with which transformers builds the family's own model.
_HARMLESS: dict[str, Callable[[Any], bool]] = {
    "is_causal": lambda value: value is None or value is True,  # false: a token also attends to later tokens
    "per_layer_config": lambda value: value is None or value == {},  # sizes of single layers
    "fusion_config": lambda value: not value,  # several modules as one
    "transformers_weights": lambda value: value is None,  # a file of weights in place of model.safetensors
    "return_dict": lambda value: value is True,  # else transformers returns tuples, with which its own code fails
    "configuration_files": lambda value: value == ["config.json"],  # files to read in place of config.json
    "output_hidden_states": lambda value: value is None or isinstance(value, bool),
    "attention_chunk_size": lambda value: value is None or (type(value) is int and abs(value) < 2**63),
    **dict.fromkeys(_INNER_MODELS, lambda value: value is None),
    # transformers makes a name for each label, which fills the memory for a huge number.
    "num_labels": lambda value: value is None or (type(value) is int and value < 2**20),
    "auto_map": lambda value: isinstance(value, dict),
    "attn_implementation": _names_or_none,
    "_attn_implementation": _names_or_none,
    "experts_implementation": _names_or_none,
}


def refuse_other_models(values: dict[str, Any], where: str) -> None:
    """Raise UserError for a key that changes the model in transformers but not here.

    Args:
        values: the content of a config.json.
        where: its path, for messages.
    """
    for key, is_harmless in _HARMLESS.items():
        if key in values and not is_harmless(values[key]):
            raise UserError(f"{where}: {key}={values[key]!r} is not supported; remove it or use a model without it")
