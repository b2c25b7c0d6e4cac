"""YAML 1.2: read and write YAML with the plain values of the core schema (yaml.org/spec/1.2.2, section 10.3).

PyYAML follows YAML 1.1, where `1e-5` is text, `on` and `no` are booleans, `12:30:00` is 45000, `010` is 8, and a key
that occurs twice silently replaces the first one.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_RESOLVERS = (
    ("null", re.compile(r"~|null|Null|NULL|"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"true|True|TRUE|false|False|FALSE"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),  # before float, whose pattern matches integers too
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<"), ["<"]),
)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} occurs twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes if YAML 1.1 or YAML 1.2 would read it as something else."""


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    try:
        return int(text, 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10)
    except ValueError:  # Python reads at most 4300 digits
        raise yaml.constructor.ConstructorError(
            None, None, f"a number of {len(text)} digits is too long", node.start_mark
        ) from None


def _construct_text(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> str:
    """Return the text of a node. JSON writes a character above U+FFFF as two escapes, `"\\ud83d\\ude00"`."""
    try:
        return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise yaml.constructor.ConstructorError(
            None, None, "half of a surrogate pair is no character", node.start_mark
        ) from None


_Loader.yaml_implicit_resolvers = {}  # without the rules of YAML 1.1
for _name, _pattern, _first in _RESOLVERS:
    _full = re.compile(rf"(?:{_pattern.pattern})$")
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _full, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)


def load_yaml(text: str) -> Any:
    """Return the value of a YAML document. Raises yaml.YAMLError for text that is no YAML, and for a repeated key."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:  # of a tag, as in `!!timestamp text`
        raise yaml.YAMLError(f"a tag (!!...) does not fit its value: {error}") from None


def dump_yaml(values: Any) -> str:
    """Return YAML from which `load_yaml` makes an equal value. The order of keys is kept."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
