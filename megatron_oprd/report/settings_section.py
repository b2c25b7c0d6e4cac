"""Show the configuration of a run: the keys that differ from the defaults, then the complete files."""

from __future__ import annotations

import json
from typing import Any

from megatron_oprd.config import changed_keys, default_text, parse_config
from megatron_oprd.evaluation.records import read_text
from megatron_oprd.report.page import details, section, table
from megatron_oprd.report.run_files import RunFiles
from megatron_oprd.types import UserError

FILES = {"plan.json": "Layer pairs and their owners (plan.json)", "environment.json": "Environment (environment.json)"}


def settings_section(run: RunFiles) -> str:
    """Return the keys that differ from the defaults as a table, and the files to unfold."""
    blocks = [details("Complete configuration (config.yaml)", run.config_text)] if run.config_text.strip() else []
    blocks += [details(title, text) for name, title in FILES.items() if (text := read_text(run.run_dir / name))]
    rows = [[key, as_text(value), default_text(key)] for key, value in changed(run).items()]
    names = ["key", "this run", "default"]
    shown = table(names, rows, text_columns=names) if rows else ""
    return section("Settings", shown + "".join(blocks), "Keys that differ from the defaults." if rows else "")


def changed(run: RunFiles) -> dict[str, Any]:
    """Return the values that differ from the defaults, by dotted key; none if this version cannot read them."""
    try:
        return changed_keys(parse_config(run.config))
    except UserError:
        return {}


def as_text(value: Any) -> str:
    """Return the value of a key as it is written on a command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
