"""Write the default configuration as YAML with comments, from the descriptions of the fields."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic.fields import FieldInfo

from megatron_oprd.config.page import first_line, values_of
from megatron_oprd.config.root import Config
from megatron_oprd.config.section import Section, section_class

HEAD = """# The default configuration. Fill in the keys marked `required` and delete what you do not change.
# Sections that are commented out are null by default.
"""


def template(key: str = "") -> str:
    """Return the defaults of the configuration, of a section, or of one key. Raises KeyError for an unknown key."""
    if not key:
        return HEAD + "\n".join(_section(Config, ""))
    model: type[Section] = Config
    *sections, last = key.split(".")
    for name in sections:
        inner = section_class(model.model_fields[name].annotation)
        if inner is None:
            raise KeyError(key)
        model = inner
    return "\n".join(_field(last, model.model_fields[last], ""))


def _section(section: type[Section], indent: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield from _field(name, field, indent)


def _field(name: str, field: FieldInfo, indent: str) -> Iterator[str]:
    inner = section_class(field.annotation)
    description = field.description or (first_line(inner) if inner is not None else "")
    if inner is not None:
        # A run needs a teacher, although the field is optional beside `teachers`.
        off = field.get_default() is None and not field.is_required() and name != "teacher"
        lines = [f"{indent}# {description}", f"{indent}{name}:", *_section(inner, f"{indent}  ")]
        yield from (_commented(line, indent) for line in lines) if off else lines
        return
    extra = field.json_schema_extra
    unit = extra.get("unit", "") if isinstance(extra, dict) else ""
    unit = "" if unit in ("", "fraction", "ratio") else f", in {unit}"
    values = values_of(field.annotation, field.metadata).replace("`", "")
    yield f"{indent}# {description} ({values}{unit})"
    if field.is_required():
        yield f"{indent}{name}:  # required"
    else:
        yield f"{indent}{name}: {json.dumps(field.get_default(), ensure_ascii=False)}"


def _commented(line: str, indent: str) -> str:
    return line if line.startswith(f"{indent}#") else f"{indent}# {line.removeprefix(indent)}"
