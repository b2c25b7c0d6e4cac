"""Explain mistakes in a configuration in one line: the key, the value, and what to write instead."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from omegaconf.errors import GrammarParseError, KeyValidationError, OmegaConfBaseException
from pydantic import ValidationError

from megatron_oprd.config.hints import CLOSE, known_keys, suggest_keys
from megatron_oprd.config.root import Config
from megatron_oprd.config.section import section_class

# A part of a message of PyYAML -> what to do.
_YAML_ADVICE = {
    "'\\t'": "indent with spaces in place of tabs",
    "constructor for the tag": "write the value without a tag (!...)",
    "occurs twice": "keep one of them",
    "mapping values are not allowed": "check the indentation",
    "expected a single document": "keep one document and remove the lines ---",
    "escape": "write a backslash in single quotes",
    "scanning an alias": "put text that begins with * in quotes",
}

_BOOLEANS = ("yes", "no", "on", "off", "y", "n", "true", "false", "0", "1")


def explain_validation(error: ValidationError) -> str:
    """Return one line about all mistakes in the values of a configuration."""
    # Unknown keys come first: they often explain why another key is missing.
    errors = sorted(_without_alternatives(error.errors()), key=lambda item: item["type"] != "extra_forbidden")
    return "; ".join(map(_explain, errors))


def explain_yaml(error: yaml.YAMLError) -> str:
    """Return one line about text that is not valid YAML: the line, the problem, and what to do."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or first_line(error)
    advice = next((cure for part, cure in _YAML_ADVICE.items() if part in str(error)), "check the brackets and quotes")
    line = "" if mark is None else f" in line {mark.line + 1}"
    return f"{problem}{line}; {advice}"


def explain_tree(error: Exception) -> str:
    """Return one line about values of which OmegaConf makes no tree: an empty key, a `${` without its end, a loop."""
    if isinstance(error, GrammarParseError):
        return f"a ${{...}} is not valid ({first_line(error)}); write ${{oc.env:NAME}} with its closing brace"
    if isinstance(error, KeyValidationError):
        return f"a key is null or not text ({first_line(error)}); write the name of a key before the colon"
    if isinstance(error, RecursionError):
        return "an alias (*) contains itself, or values are nested too deeply; write the values out"
    return first_line(error)


def explain_interpolation(error: OmegaConfBaseException) -> str:
    """Return one line about a `${...}` that has no value."""
    text = first_line(error)
    if (variable := re.search(r"Environment variable '(.+?)'", text)) is not None:
        return f"the environment variable {variable[1]} is not set; set it, or write ${{oc.env:{variable[1]},DEFAULT}}"
    if (key := re.search(r"Interpolation key '(.+?)'", text)) is not None:
        if "." in key[1]:
            return f"${{{key[1]}}} is not set here; set {key[1]} too"
        return f"${{{key[1]}}} names no key; an environment variable is ${{oc.env:{key[1]}}}"
    return f"{text}; write a dollar sign for ${{oc.env:NAME}} and ${{section.key}} alone"


def first_line(error: Exception) -> str:
    """Return the first line of the text of an exception."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _annotation(location: tuple[Any, ...]) -> Any:
    """Return the type at a location of the configuration, or None if there is no such key."""
    found: Any = Config
    for part in location:
        model, mapping = section_class(found), get_origin(found) is dict
        field = model.model_fields.get(part) if model else None
        found = get_args(found)[1] if mapping else field.annotation if field else None
    return found


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model = section_class(_annotation(location))
    return list(model.model_fields) if model is not None else []


def _without_alternatives(errors: Iterable[Any]) -> list[Mapping[str, Any]]:
    """Merge the errors of each value into one. pydantic reports one error for each type that a value may have.

    Errors about a part of the value replace errors about the value as a whole.
    """
    grouped: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for error in errors:
        location = tuple(error["loc"])
        place = next((location[:end] for end in range(len(location)) if _has_alternatives(location[:end])), location)
        grouped.setdefault(place, []).append({**error, "loc": place + location[len(place) + 1 :]})
    merged = []
    for place, items in grouped.items():
        inside = [item for item in items if len(item["loc"]) > len(place)]
        first, *others = items
        more = (_expected(item) for item in others)
        merged += inside or [{**first, "msg": " or ".join([first["msg"], *more])}]
    return merged


def _expected(item: Mapping[str, Any]) -> str:
    if item["type"] == "model_type":
        return f"a section with {', '.join(_known_keys(item['loc']))}"
    return str(item["msg"]).removeprefix("Input should be ")


def _has_alternatives(location: tuple[Any, ...]) -> bool:
    annotation = _annotation(location)
    types = [kind for kind in get_args(annotation) if kind is not NoneType]
    return get_origin(annotation) in (Union, UnionType) and len(types) > 1


def _explain(item: Any) -> str:
    location, value = tuple(item["loc"]), item["input"]
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_hint(location, value)}"
    if location[-1:] == ("[key]",):
        return f"{'.'.join(map(str, location[:-2]))}: the name {value!r} is no text; put it in quotes"
    if item["type"] == "invalid_key":
        return f"unknown key {key}; write a number without a comma inside (1000, 0.1)"
    if item["type"] == "missing":
        section = section_class(_annotation(location))
        fields = section.model_fields if section is not None else {}
        inner = [f"{key}.{name}" for name, field in fields.items() if field.is_required()]
        return f"{key} is required" + (f": set {', '.join(inner)}" if inner else "")
    if item["type"] == "model_type":
        return (
            f"{key}={_as_written(value)} must be a section with {', '.join(_known_keys(location))}"
            + _section_advice(key, location, value)
        )
    message = item["msg"].removeprefix("Value error, ")
    message += _advice(message, value, location)
    return message if not key or message.startswith(key) else f"{key}={_as_written(value)}: {message}"


def _section_advice(key: str, location: tuple[Any, ...], value: Any) -> str:
    known = _known_keys(location)
    if value is None:
        return "; leave it out for its defaults"
    if isinstance(value, str) and value.partition(":")[0] in known:
        return "; write a space after each colon"
    return f"; write {key}.path={value}" if "path" in known and isinstance(value, str) else ""


def _hint(location: tuple[Any, ...], value: Any) -> str:
    """Return what to write instead of an unknown key, in brackets, or ''."""
    name, section, known = str(location[-1]), ".".join(map(str, location[:-1])), _known_keys(location[:-1])
    dotted = f"{section}.{name}" if section else name
    if "." in name and dotted in known_keys():
        parent, _, last = dotted.rpartition(".")
        return f" (write {last} under the section {parent})"
    if name.partition(":")[0] in known and value is None:
        return " (write a space after the colon)"

    def nearest(similarity: float) -> list[str]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=similarity)
        return [f"{section}.{found}" if section else found for found in near]

    suggested = nearest(0.6 if section else CLOSE) or suggest_keys(name) or nearest(0.0)
    return f" (did you mean {' or '.join(suggested)}?)" if suggested else ""


def _advice(message: str, value: Any, location: tuple[Any, ...]) -> str:
    """Return what to write instead of a value that YAML takes for something else than its author did, or ''."""
    wants_number = "integer" in message or "number" in message
    wants_list = "list" in message or "tuple" in message
    match value:
        case None:
            return "" if "string" in message else "; leave the key out for its default"
        case str() if value.lower() in ("none", "nil", "null") and NoneType in get_args(_annotation(location)):
            return "; write null"
        case str() | bool() | int() if "boolean" in message and str(value).lower() in _BOOLEANS:
            return "; write true or false"
        case str() if wants_list and re.search(r"[\s,;]", value.strip()):
            return f"; write a list as [{', '.join(re.split('[ ,;()]+', value.strip(' ()')))}]"
        case str() if wants_number and "_" in value:
            return "; write the digits without _"
        case str() if wants_number and re.fullmatch(r"[-+]?[\d.]+(?:[eE][-+]?\d+)?", value):
            return "; write the number without quotes"
        case str() if wants_number and re.match(r"[-+]?\.?\d", value):
            return f"; write a plain number{_in_unit(location)}"
        case float() if "integer" in message and value.is_integer():
            return f"; write {int(value)}"
        case bool() | int() | float() if "string" in message:
            return """; put it in quotes, on the command line in two pairs: '"..."'"""
    return ""


def _in_unit(location: tuple[Any, ...]) -> str:
    section = section_class(_annotation(location[:-1])) if len(location) > 1 else None
    field = section.model_fields.get(str(location[-1])) if section is not None else None
    extra = field.json_schema_extra if field is not None else None
    return f" in {extra['unit']}" if isinstance(extra, dict) and "unit" in extra else ""


def _as_written(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
