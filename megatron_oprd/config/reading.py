"""Read the configuration from YAML and dotted overrides (`a.b=1`), and explain mistakes in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from megatron_oprd.config.mistakes import (
    explain_interpolation,
    explain_tree,
    explain_validation,
    explain_yaml,
    first_line,
)
from megatron_oprd.config.root import FOR_EVALUATION, Config
from megatron_oprd.config.section import Section, section_class
from megatron_oprd.config.yaml_core import dump_yaml, load_yaml
from megatron_oprd.types import UserError


def load_config(path: str | Path | None, overrides: list[str], *, for_evaluation: bool = False) -> Config:
    """Return the configuration of a YAML file (None: without a file) and of overrides like `parallel.tensor=2`.

    A later override replaces an earlier one. With `for_evaluation`, training prompts and a teacher are not required,
    and `train.run_dir` is the current folder by default. No communication. Raises UserError with one line that names
    the key, its value and what would work.
    """
    try:
        of_file = _read_yaml(Path(path)) if path is not None else {}
        tree: Any = OmegaConf.create(of_file)
    except (OmegaConfBaseException, RecursionError) as error:  # an anchor can make a loop
        key = getattr(error, "full_key", None)
        raise UserError(f"the configuration {path}{f', {key}' if key else ''}: {explain_tree(error)}") from None
    wrong_sections = tuple(f"{section}." for section in _sections_without_keys(of_file, Config))
    for override in overrides:
        key, equals, value = override.partition("=")
        key = re.sub(r"\[(['\"])(.*?)\1\]", r"[\2]", key.strip())  # teachers['a.b'] is teachers[a.b]
        if not equals or "" in re.split(r"\.(?![^\[]*\])", key):
            raise UserError(f"override {override!r} is not of the form key=value; write for example train.steps=100")
        if key.startswith(wrong_sections):  # would replace the text, of which the validation complains
            continue
        try:
            if re.fullmatch(
                r"\s*(---|\.\.\.)(\s.*)?", value, re.DOTALL
            ):  # a mark between documents, but text in a file
                raise yaml.YAMLError("it begins with a mark between documents")
            OmegaConf.update(tree, key, load_yaml(value), merge=True, force_add=True)
        except yaml.YAMLError as error:
            hint = f"""if it is text, put it in quotes: {key}='"..."'"""
            raise UserError(f"override {override!r} has no YAML value ({first_line(error)}); {hint}") from None
        except (OmegaConfBaseException, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(f"override {override!r}: {explain_tree(error)}") from None
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        place = "" if path is None else f"the configuration {path}: "
        raise UserError(place + explain_interpolation(error)) from None
    return parse_config(values, for_evaluation=for_evaluation)


def parse_config(values: Any, *, for_evaluation: bool = False) -> Config:
    """Return the configuration of a plain mapping. Raises UserError with one line that names every wrong key.

    `for_evaluation`: as in `load_config`.
    """
    if for_evaluation and isinstance(values, dict) and isinstance(train := values.get("train", {}), dict):
        values = {**values, "train": {"run_dir": ".", **train}}
    try:
        context = FOR_EVALUATION if for_evaluation else None
        return Config.model_validate(_lists_of_one(_tuples(values)), context=context)
    except ValidationError as error:
        raise UserError(explain_validation(error)) from None


def dump_config(config: Config) -> str:
    """Return YAML from which `load_config` makes an equal configuration."""
    return dump_yaml(config.model_dump(mode="json"))


def changed_keys(config: Config) -> dict[str, Any]:
    """Return the values that differ from the defaults, by dotted key. Keys without a default are included."""
    return dict(leaves(config.model_dump(mode="json", exclude_defaults=True)))


def default_text(key: str) -> str:
    """Return the default of a dotted key as a command line has it; `required` for a key without one."""
    section: type[Section] | None = Config
    *sections, name = key.split(".")
    for one in sections:
        field = section.model_fields.get(one) if section is not None else None
        section = None if field is None else section_class(field.annotation)
    field = section.model_fields.get(name) if section is not None else None
    if field is None:
        return ""  # a key of a mapping
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return the configuration with other values, by dotted key. Raises UserError if they do not fit the others."""
    values = config.model_dump(mode="json")
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = values
        for one in sections:
            section = section[one]
        section[name] = value
    return parse_config(values)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each dotted key of nested mappings with its value. A list or an empty mapping is one value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}; name a YAML file") from None
    except UnicodeDecodeError:
        raise UserError(f"the configuration {path} is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"the configuration {path} is not valid YAML: {explain_yaml(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(
            f"the configuration {path} is a {type(values).__name__}; write sections, each with keys below it"
        )
    return values


def _sections_without_keys(values: Mapping[Any, Any], section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of each section that has another value than keys, as `steps:5` without a space gives it."""
    for key, value in values.items():
        field = section.model_fields.get(key)
        inner = section_class(field.annotation) if field is not None else None
        if field is None or inner is None or value is None:
            continue
        if isinstance(value, dict):
            yield from _sections_without_keys(value, inner, f"{prefix}{key}.")
        elif not set(get_args(field.annotation)) - {inner, NoneType}:  # else the key also takes another type
            yield f"{prefix}{key}"


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
