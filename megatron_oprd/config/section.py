"""The base class of every section of the configuration, and the units that fields name."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic.config import JsonDict


class Section(BaseModel):
    """A strict, frozen part of the configuration; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


# Values for `json_schema_extra`: the unit of a field, which docs/configuration.md prints.
TOKENS: JsonDict = {"unit": "tokens"}
BYTES: JsonDict = {"unit": "bytes"}
STEPS: JsonDict = {"unit": "steps"}
SECONDS: JsonDict = {"unit": "seconds"}
PROMPTS: JsonDict = {"unit": "prompts"}
RANKS: JsonDict = {"unit": "ranks"}
LAYERS: JsonDict = {"unit": "layers"}
FRACTION: JsonDict = {"unit": "fraction"}
RATIO: JsonDict = {"unit": "ratio"}
