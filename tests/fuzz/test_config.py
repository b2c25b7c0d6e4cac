"""A value means the same in a file and on the command line, however it is spelled, and a dump reads back equal."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel

from megatron_oprd.config import Config, dump_config, load_config
from megatron_oprd.types import UserError
from tests.fuzz.budget import examples

REQUIRED = {"student.path": "s", "teacher.path": "t", "train.run_dir": "r", "data.prompts": "[p.jsonl]"}


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Return the annotation of each key of the configuration that is not a section."""
    found = {}
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        section = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if section is None:
            found[prefix + name] = field.annotation
        elif get_origin(field.annotation) is not dict:
            found |= leaves(section, f"{prefix}{name}.")
    return found


KEYS = {key: kind for key, kind in leaves(Config).items() if key not in REQUIRED}


def spelled_integer(value: int) -> st.SearchStrategy[str]:
    spellings = [str(value)]
    if value >= 0:
        spellings += [f"+{value}", f"00{value}", hex(value), f"0o{value:o}"]
    return st.sampled_from(spellings)


def spelled_float(value: float) -> st.SearchStrategy[str]:
    mantissa, _, exponent = f"{value!r}".partition("e")
    spellings = [repr(value), f"{value:.17e}", f"{value:.17E}", f"{mantissa}E{exponent or 0}"]
    return st.sampled_from([text.replace("e+", "e") for text in spellings] + spellings)


def spelled_text(value: str) -> st.SearchStrategy[str]:
    return st.sampled_from(
        [json.dumps(value, ensure_ascii=False), json.dumps(value), f"'{value.replace(chr(39), chr(39) * 2)}'"]
    )


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="$\\", exclude_categories=("Cc", "Cs")), max_size=12)
INTEGERS = st.integers(0, 9) | st.integers(-3, 10**20)
FLOATS = st.floats(0, 2) | st.floats(allow_nan=False, allow_infinity=False)


def spelled(kind: Any) -> st.SearchStrategy[tuple[Any, str]]:
    """Return values of an annotation, each with a spelling in YAML."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return spelled(arguments[0])
    if origin is Literal:
        return st.sampled_from(arguments).flatmap(
            lambda value: spelled(type(value)).map(lambda _: (value, json.dumps(value)))
        )
    if origin in (Union, UnionType):
        return st.one_of(*map(spelled, arguments))
    if origin is list:
        items = st.lists(spelled(arguments[0]), max_size=3)
        return items.map(lambda pairs: ([v for v, _ in pairs], f"[{', '.join(text for _, text in pairs)}]"))
    if origin is tuple:
        return st.tuples(*map(spelled, arguments)).map(
            lambda pairs: (tuple(v for v, _ in pairs), f"[{', '.join(text for _, text in pairs)}]")
        )
    if origin is dict or kind is Any:
        values = st.dictionaries(
            st.text("abc", min_size=1), st.none() | st.booleans() | INTEGERS | FLOATS | TEXT, max_size=3
        )
        return values.map(lambda value: (value, json.dumps(value)))
    if kind is NoneType:
        return st.sampled_from([(None, text) for text in ("null", "~", "Null", "")])
    if kind is bool:
        return st.booleans().flatmap(
            lambda v: st.sampled_from([(v, t) for t in (str(v), str(v).lower(), str(v).upper())])
        )
    if kind is int:
        return INTEGERS.flatmap(lambda value: st.tuples(st.just(value), spelled_integer(value)))
    if kind is float:
        integers = INTEGERS.flatmap(lambda value: st.tuples(st.just(float(value)), spelled_integer(value)))
        return FLOATS.flatmap(lambda value: st.tuples(st.just(value), spelled_float(value))) | integers
    if issubclass(kind, BaseModel):  # a section in a list
        fields = st.fixed_dictionaries({name: spelled(field.annotation) for name, field in kind.model_fields.items()})
        return fields.map(
            lambda values: (
                kind.model_construct(**{name: value for name, (value, _) in values.items()}),
                f"{{{', '.join(f'{name}: {text}' for name, (_, text) in values.items())}}}",
            )
        )
    assert kind is str, kind
    return TEXT.flatmap(lambda value: st.tuples(st.just(value), spelled_text(value)))


def outcome(path: Path | None, overrides: list[str]) -> Config | str:
    """Return the configuration, or the line that refuses it."""
    try:
        return load_config(path, overrides)
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)


def as_file(folder: Path, values: dict[str, str]) -> Path:
    """Write dotted keys as nested sections, each value as it is spelled."""
    tree: dict[str, Any] = {}
    for key, text in values.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = text

    def lines(tree: dict[str, Any], indent: str) -> list[str]:
        found = []
        for key, value in tree.items():
            found += (
                [f"{indent}{key}:", *lines(value, indent + "  ")]
                if isinstance(value, dict)
                else [f"{indent}{key}: {value}"]
            )
        return found

    path = folder / "c.yaml"
    path.write_text("\n".join(lines(tree, "")) + "\n", encoding="utf-8")
    return path


def value_at(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


@st.composite
def chosen_keys(draw: st.DrawFn) -> dict[str, tuple[Any, str]]:
    return {
        key: draw(spelled(KEYS[key])) for key in draw(st.lists(st.sampled_from(sorted(KEYS)), max_size=4, unique=True))
    }


@examples(120)
@given(chosen_keys(), st.data())
def test_a_file_and_the_command_line_mean_the_same_and_a_dump_reads_back_equal(chosen, data):
    values = REQUIRED | {key: text for key, (_, text) in chosen.items()}
    overrides = [f"{key}={text}" for key, text in values.items()]
    in_file = set(data.draw(st.lists(st.sampled_from(sorted(values)), unique=True)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = outcome(as_file(folder, values), [])
        assert outcome(None, overrides) == file
        # A key on the command line replaces that of the file.
        both = as_file(folder, {key: text for key, text in values.items() if key in in_file})
        assert outcome(both, [f"{key}={text}" for key, text in values.items() if key not in in_file]) == file
        if isinstance(file, str):
            assert any(key.rpartition(".")[0] in file for key in chosen), file
            return
        for key, (value, _) in chosen.items():
            found = value_at(file, key)
            assert found == value or (isinstance(value, str) and found == str(Path(value).expanduser())), key
            assert not isinstance(found, float) or math.isfinite(found)
        (folder / "dump.yaml").write_text(dump_config(file), encoding="utf-8")
        assert load_config(folder / "dump.yaml", []) == file


WRITTEN = """1e-5 1E5 .5 5. 1e400 -0 +1 010 0o17 0x1F 0b11 1_000 12:30:00 2024-01-31 on Off YES no y n ~ null Null
.inf -.inf .nan TRUE true True [] {} [1] [[1,2]] a,b !!binary &a *a | > --- ... ??? << = ${oc.env:HOME} ${student.path}
${ $a 'a"""
PLAIN = st.sampled_from([*WRITTEN.split(), "!!int 1", "!!str 1", "&a 1", ""]) | st.text(
    "0123456789.eE+-_:xo[]{},'\"~$&*!|>%@`#? ab", max_size=10
)


@examples(200)
@given(st.sampled_from(sorted(KEYS) + sorted(REQUIRED)), PLAIN)
@example("data.prompts", "[" * 400)
@example("train.steps", "9" * 5000)
@example("train.steps", "!!timestamp a")
@example("train.run_dir", '"\\ud83d"')
def test_any_text_as_a_value_is_read_or_refused_in_one_line(key, text):
    others = {name: value for name, value in REQUIRED.items() if name != key}
    with tempfile.TemporaryDirectory() as name:
        file = outcome(as_file(Path(name), others | {key: text}), [])
    override = outcome(None, [*(f"{name}={value}" for name, value in others.items()), f"{key}={text}"])
    if isinstance(file, Config) and isinstance(override, Config):
        assert file == override, text


@examples(150)
@given(st.text("abtrain.[]=01\"' -{}$\\", max_size=12), st.sampled_from(["1", "a", "[1]", "{a: 1}", ""]))
def test_any_key_of_an_override_is_read_or_refused_in_one_line(key, text):
    outcome(None, [*(f"{name}={value}" for name, value in REQUIRED.items()), f"{key}={text}"])


@examples(100)
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_content_of_a_file_is_read_or_refused_in_one_line(content):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "c.yaml"
        path.write_bytes(content)
        outcome(path, [])
