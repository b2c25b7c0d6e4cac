"""Read the right answer of a row. A value that no answer could equal is refused."""

from __future__ import annotations

import decimal
from math import isfinite, isnan
from typing import Any

from megatron_oprd.data.literals import parse_literal

GroundTruth = str | tuple[str, ...]  # several: any of them is right


def read_ground_truth(value: Any) -> GroundTruth | None:
    """Return the right answer, several right answers, or None if the row has none.

    Args:
        value: text, a number, null, or a list of texts and numbers of which any is right. Text that is the JSON or
            Python form of such a list, as some data sets store it, counts as that list, and empty text and NaN count
            as null. The answer of a solution in the form of GSM8K follows `####`.

    Raises:
        ValueError: the value is of another type or an empty list. Says what would work.
    """
    if _is_missing(value):
        return None
    if isinstance(value, str):
        value = value.rpartition("####")[2].strip() if "####" in value else value
        written = _written_list(value)
        return value or None if written is None else _several(written)
    if isinstance(value, list | tuple):
        return _several(list(value))
    return _number(value)


def _is_missing(value: Any) -> bool:
    """Return True for null, for empty text, and for NaN, which pandas writes for a missing number."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and isnan(value))
    )


def _several(values: list[Any]) -> GroundTruth | None:
    if not values:
        raise ValueError("is an empty list; use null for a row without a right answer")
    truths = tuple(value if isinstance(value, str) else _number(value) for value in values if not _is_missing(value))
    return truths[0] if len(truths) == 1 else truths or None


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        raise ValueError(f"is a {type(value).__name__}; use text, a number, or a list of those")
    if not isfinite(value):
        raise ValueError(f"is {value}; use a finite number, or null for a row without a right answer")
    text = str(value)
    # str(1e22) is "1e+22", which is no number in an answer.
    return format(decimal.Decimal(text), "f") if "e" in text.lower() else text


def _written_list(text: str) -> list[Any] | None:
    """Return the list whose JSON or Python form `text` is, else None. `[0, 1]` may be an interval and stays text.

    Raises ValueError for the form of a dict, which no answer equals.
    """
    text = text.strip()
    if not text.startswith(("[", "{")) or not text.endswith(("]", "}")):
        return None
    value = parse_literal(text)
    if isinstance(value, dict):
        raise ValueError("is a dict written as text; use text, a number, or a list of those")
    is_list = isinstance(value, list) and (len(value) < 2 or any(isinstance(item, str) for item in value))
    return value if is_list else None
