"""Read a line of a JSONL file that a user wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[bytes]:
    r"""Return the lines of a file, without a byte order mark. Raises OSError.

    Lines end at `\n` alone: str.splitlines also splits at characters that a JSON string may contain.
    """
    return path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")


def parse_object(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Raises ValueError for anything else, and for a key that occurs twice, of which JSON readers ignore one.
    """
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_distinct)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno}); write one object a line") from None
    except _RepeatedKeyError:
        raise
    except ValueError as error:  # a number with thousands of digits
        raise ValueError(f"not JSON ({error}); write one object a line") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deeply); write one object of texts, numbers and lists a line") from None
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}; write one JSON object a line")
    return record


class _RepeatedKeyError(ValueError):
    pass


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"the key {twice!r} occurs twice in one object; keep one of them")
    return values
