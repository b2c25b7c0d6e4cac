"""Recognise values that a data set stores in their JSON or Python form, as text."""

from __future__ import annotations

import ast
import json
from typing import Any


def parse_literal(text: str) -> Any:
    """Return the value whose JSON or Python form is `text`, or None if it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
