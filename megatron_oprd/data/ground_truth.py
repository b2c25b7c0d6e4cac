"""Read the right answer of a row. A value that no answer could equal is refused."""

from __future__ import annotations

import decimal
from typing import Any

from megatron_oprd.data.literals import parse_literal

GroundTruth = str | tuple[str, ...]  # several: any of them is right


def read_ground_truth(value: Any) -> GroundTruth | None:
    """Return the right answer, several right answers, or None if the row has none.

    Args:
        value: text, a number, null, or a list of texts and numbers of which any is right. Text that is the JSON or
            Python form of a list of texts, as some data sets store it, counts as that list. The answer of a solution
            in the form of GSM8K follows `####`.

    Raises:
        ValueError: the value is of another type or an empty list.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = value.rpartition("####")[2].strip() if "####" in value else value
        written = _written_list(value)
        return value if written is None else _several(written)
    if isinstance(value, list | tuple):
        return _several(list(value))
    return _number(value)


def _several(values: list[Any]) -> GroundTruth:
    if not values:
        raise ValueError("is an empty list; use null for a row without a right answer")
    truths = tuple(value if isinstance(value, str) else _number(value) for value in values)
    return truths[0] if len(truths) == 1 else truths


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        raise ValueError(f"is a {type(value).__name__}; use text, a number, or a list of those")
    text = str(value)
    # str(1e22) is "1e+22", which is no number in an answer.
    return format(decimal.Decimal(text), "f") if "e" in text.lower() else text


def _written_list(text: str) -> list[Any] | None:
    """Return the list of texts whose JSON or Python form `text` is, else None: "[0, 1]" may be an interval."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]") and text[1:].lstrip().startswith(('"', "'"))):
        return None
    value = parse_literal(text)
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None
