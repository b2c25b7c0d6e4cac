"""Check single values of a config.json. Each check raises UserError with the file, the key and the value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_oprd.types import UserError


def check_integers(values: dict[str, Any], keys: Iterable[str], where: str, least: int = 1) -> None:
    """Raise UserError for a value that is not an integer of at least `least` and of at most 64 bits."""
    for key in keys:
        value = values.get(key)
        if type(value) is not int or not least <= value < 2**63:  # a bool is an instance of int
            positive = {0: "non-negative", 1: "positive"}.get(least)
            wanted = f"a {positive} whole number" if positive else f"a whole number of at least {least}"
            raise UserError(f"{where}: {key}={value!r} must be {wanted}")


def check_positive(values: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Raise UserError for a value that is not a positive, finite number."""
    for key in keys:
        if not is_positive(values.get(key)):
            raise UserError(f"{where}: {key}={values.get(key)!r} must be a positive number")


def is_positive(value: Any) -> bool:
    """Return True for a number above zero and below infinity."""
    return type(value) in (int, float) and 0 < value < math.inf
