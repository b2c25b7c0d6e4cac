"""Random damage of a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

STRANGE = st.sampled_from(
    [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "text", [], {}, [[]], ["a"], {"a": 1}, [None]]
)


def change_value(draw: st.DrawFn, value: Any) -> Any:
    """Replace or remove a value at a random place of a JSON document."""
    if isinstance(value, dict | list) and value and draw(st.booleans()):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw(st.sampled_from(keys))
        if isinstance(value, dict) and draw(st.integers(0, 4)) == 0:
            return {other: item for other, item in value.items() if other != key}
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        changed = {other: change_value(draw, item) if other == key else item for other, item in pairs}
        return changed if isinstance(value, dict) else list(changed.values())
    return draw(STRANGE)


@st.composite
def damages(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Return a change of the content of a file: a cut, changed bytes, or another value in a line of JSON."""
    kind = draw(st.sampled_from(["cut", "bytes", "json", "json", "json"]))
    place = draw(st.floats(0, 1, exclude_max=True))
    if kind == "cut":
        return lambda data: data[: int(len(data) * place)]
    if kind == "bytes":
        new = draw(st.binary(min_size=1, max_size=8))
        return lambda data: data[: int(len(data) * place)] + new + data[int(len(data) * place) + len(new) :]

    def change(data: bytes) -> bytes:
        try:
            return json.dumps(change_value(draw, json.loads(data))).encode()
        except ValueError:
            pass
        try:
            first, *others = data.decode().splitlines()
            return "\n".join([json.dumps(change_value(draw, json.loads(first))), *others]).encode()
        except ValueError:  # no JSON at all
            return data[: int(len(data) * place)]

    return change
