"""Checks of single values in a config.json, each of which raises UserError with file, key and value."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from megatron_oprd.types import UserError


def check_whole(values: dict[str, Any], keys: Iterable[str], where: str, least: int = 1) -> None:
    """Whole numbers of at least `least`."""
    for key in keys:
        value = values.get(key)
        if type(value) is not int or value < least:  # True is an int, too
            positive = {0: "non-negative", 1: "positive"}.get(least)
            wanted = f"a {positive} whole number" if positive else f"a whole number of at least {least}"
            raise UserError(f"{where}: {key}={value!r} must be {wanted}")


def check_positive(values: dict[str, Any], keys: Iterable[str], where: str) -> None:
    """Positive, finite numbers."""
    for key in keys:
        if not is_positive(values.get(key)):
            raise UserError(f"{where}: {key}={values.get(key)!r} must be a positive number")


def is_positive(value: Any) -> bool:
    """Whether a value is a number above zero and below infinity."""
    return type(value) in (int, float) and 0 < value < math.inf
