"""Read the configuration from YAML and dotted overrides (`a.b=1`), and explain mistakes in one line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_oprd.config.hints import CLOSE, suggest_keys
from megatron_oprd.config.root import Config
from megatron_oprd.config.section import section_class
from megatron_oprd.config.yaml_core import dump_yaml, load_yaml
from megatron_oprd.types import UserError


def load_config(path: str | Path | None, overrides: list[str]) -> Config:
    """Return the configuration of a YAML file (None: without a file) and of overrides like `parallel.tensor=2`.

    A later override replaces an earlier one. No communication. Raises UserError with one line that names the key, its
    value and what would work.
    """
    try:
        tree: Any = OmegaConf.create(_read_yaml(Path(path)) if path is not None else {})
    except (OmegaConfBaseException, RecursionError) as error:  # an anchor can make a loop
        key = getattr(error, "full_key", None)
        raise UserError(f"the configuration {path}{f', {key}' if key else ''}: {_first_line(error)}") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        if not (equals and key.strip()):
            raise UserError(f"override {override!r} is not of the form key=value")
        try:
            OmegaConf.update(tree, key.strip(), load_yaml(value), merge=True, force_add=True)
        except yaml.YAMLError as error:
            hint = f"""if it is text, put it in quotes: {key.strip()}='"..."'"""
            raise UserError(f"override {override!r} has no YAML value ({_first_line(error)}); {hint}") from None
        except (OmegaConfBaseException, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"override {override!r}: {_first_line(error)}") from None
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_first_line(error)}") from None
    return parse_config(values)


def parse_config(values: Any) -> Config:
    """Return the configuration of a plain mapping. Raises UserError with one line that names every wrong key."""
    try:
        return Config.model_validate(_lists_of_one(_tuples(values)))
    except ValidationError as error:
        # Unknown keys come first: they often explain why another key is missing.
        errors = sorted(_without_alternatives(error.errors()), key=lambda item: item["type"] != "extra_forbidden")
        raise UserError("; ".join(map(_explain, errors))) from None


def dump_config(config: Config) -> str:
    """Return YAML from which `load_config` makes an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the configuration {path} is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"the configuration {path} must be a mapping of sections, not a {type(values).__name__}")
    return values


def _tuples(values: Any) -> Any:
    """Convert the lists of the two keys that are tuples: YAML has no tuples, and strict pydantic accepts no list."""
    if not isinstance(values, dict):
        return values
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    optimizer = values.get("optimizer")
    if isinstance(optimizer, dict) and isinstance(optimizer.get("betas"), list):
        optimizer["betas"] = tuple(optimizer["betas"])
    loss = values.get("loss")
    if isinstance(loss, dict) and isinstance(loss.get("representation"), dict):
        representation = dict(loss["representation"])
        if isinstance(representation.get("pairs"), list):
            representation["pairs"] = [tuple(p) if isinstance(p, list) else p for p in representation["pairs"]]
        values["loss"] = {**loss, "representation": representation}
    return values


def _lists_of_one(values: Any) -> Any:
    """Put a value without brackets into a list, for the keys that are lists of texts or numbers: `bridge.ranks=8`."""
    if not isinstance(values, dict):
        return values
    values = dict(values)
    for section, model in ((name, section_class(field.annotation)) for name, field in Config.model_fields.items()):
        if model is None or not isinstance(values.get(section), dict):
            continue
        values[section] = {
            key: [value] if _is_item(value, model.model_fields.get(key)) else value
            for key, value in values[section].items()
        }
    return values


def _is_item(value: Any, field: FieldInfo | None) -> bool:
    """Return True if the field is a list, and the value has the type of its items."""
    if field is None or get_origin(field.annotation) is not list:
        return False
    item = get_args(field.annotation)[0]
    if get_origin(item) is Annotated:
        item = get_args(item)[0]
    types = {str: (str,), int: (int,), float: (int, float)}.get(item, (str,) if get_origin(item) is Literal else ())
    return isinstance(value, types) and not isinstance(value, bool)


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
    location = tuple(item["loc"])
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key}{_hint(location)}"
    if location[-1:] == ("[key]",):
        return f"{'.'.join(map(str, location[:-2]))}: the name {item['input']!r} is no text; put it in quotes"
    if item["type"] == "missing":
        section = section_class(_annotation(location))
        fields = section.model_fields if section is not None else {}
        inner = [f"{key}.{name}" for name, field in fields.items() if field.is_required()]
        return f"{key} is required" + (f": set {', '.join(inner)}" if inner else "")
    if item["type"] == "model_type":
        known = _known_keys(location)
        hint = f"; write {key}.path={item['input']}" if "path" in known and isinstance(item["input"], str) else ""
        return f"{key}={item['input']!r} must be a section with {', '.join(known)}{hint}"
    message = item["msg"].removeprefix("Value error, ")
    message += _advice(message, item["input"])
    return message if not key or message.startswith(key) else f"{key}={_as_written(item['input'])}: {message}"


def _hint(location: tuple[Any, ...]) -> str:
    """Return the keys that an unknown key may stand for, in brackets, or ''."""
    name, section, known = str(location[-1]), ".".join(map(str, location[:-1])), _known_keys(location[:-1])

    def nearest(similarity: float) -> list[str]:
        near = difflib.get_close_matches(name, known, n=1, cutoff=similarity)
        return [f"{section}.{found}" if section else found for found in near]

    suggested = nearest(0.6 if section else CLOSE) or suggest_keys(name) or nearest(0.0)
    return f" (did you mean {' or '.join(suggested)}?)" if suggested else ""


def _advice(message: str, value: Any) -> str:
    """Return what to write instead of a value that YAML takes for something else than its author did, or ''."""
    match value:
        case str() if "boolean" in message and value.lower() in ("yes", "no", "on", "off"):
            return "; write true or false"
        case str() if "_" in value and ("integer" in message or "number" in message):
            return "; write the digits without _"
        case bool() | int() | float() if "string" in message:
            return """; put it in quotes, on the command line in two pairs: '"..."'"""
    return ""


def _as_written(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
