"""The base class of every section of the configuration, and the units that fields name."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.config import JsonDict

_SHELL_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)")


class Section(BaseModel):
    """A strict, frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def section_class(annotation: Any) -> type[Section] | None:
    """Return the class of a field that is a section, or None. A mapping of sections is not one."""
    candidates = [annotation, *get_args(annotation)] if get_origin(annotation) is not dict else []
    return next((kind for kind in candidates if isinstance(kind, type) and issubclass(kind, Section)), None)


def _expand_path(text: str) -> str:
    """Return a path with the home folder in place of `~`.

    Raises ValueError for an empty path, for a control character and for `$NAME`.
    """
    if not text.strip():
        raise ValueError("the path is empty; name a file or a folder")
    if not text.isprintable():
        raise ValueError("the path has a control character; write a backslash in single quotes")
    variable = _SHELL_VARIABLE.search(text)
    if variable is not None:
        raise ValueError(f"write an environment variable as ${{oc.env:{variable[1]}}}")
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(_expand_path)]  # a file, a folder or the name of a dataset


# Values for `json_schema_extra`: the unit of a field, which docs/configuration.md prints.
TOKENS: JsonDict = {"unit": "tokens"}
BYTES: JsonDict = {"unit": "bytes"}
NATS: JsonDict = {"unit": "nats"}
GIGABYTES: JsonDict = {"unit": "GB (10^9 bytes)"}
STEPS: JsonDict = {"unit": "steps"}
MINUTES: JsonDict = {"unit": "minutes"}
SECONDS: JsonDict = {"unit": "seconds"}
PROMPTS: JsonDict = {"unit": "prompts"}
RANKS: JsonDict = {"unit": "ranks"}
LAYERS: JsonDict = {"unit": "layers"}
FRACTION: JsonDict = {"unit": "fraction"}
RATIO: JsonDict = {"unit": "ratio"}
