"""docs/configuration.md is generated from the descriptions of the configuration's fields."""

from pathlib import Path

from megatron_oprd.config import Config
from megatron_oprd.config.page import page
from megatron_oprd.config.section import section_class

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_up_to_date():
    command = "python -m megatron_oprd.config.page > docs/configuration.md"
    assert PAGE.read_text() == page(), f"docs/configuration.md is stale; run {command}"


def undescribed(section, prefix=""):
    found = []
    for key, field in section.model_fields.items():
        inner = section_class(field.annotation)
        if inner is not None:
            found += [] if inner.__doc__ else [f"{prefix}{key}"]
            found += undescribed(inner, f"{prefix}{key}.")
        elif not field.description:
            found.append(f"{prefix}{key}")
    return found


def test_every_key_has_a_description():
    assert undescribed(Config) == []
