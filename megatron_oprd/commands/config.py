"""Print the configuration: the defaults with comments, one section or key of them, or a resolved configuration."""

from __future__ import annotations

from megatron_oprd.config import dump_config, load_config
from megatron_oprd.config.hints import suggest_keys
from megatron_oprd.config.template import template
from megatron_oprd.runtime.cli import ArgumentParser, run_command
from megatron_oprd.types import UserError

PARSER = ArgumentParser(prog="megatron-oprd config", description=__doc__)
PARSER.add_argument("--config", help="YAML file whose resolved configuration is printed")
PARSER.add_argument("--resolved", action="store_true", help="print every key with the value that a run would use")
PARSER.add_argument("keys", nargs="*", metavar="KEY", help="section or key to print, or overrides like train.steps=9")


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Raises UserError for an unknown key."""
    options = PARSER.parse_args(arguments)
    overrides = [key for key in options.keys if "=" in key]
    keys = [key for key in options.keys if "=" not in key]
    if options.resolved or options.config or overrides:
        if keys:
            raise UserError(f"config {keys[0]} prints defaults; leave out {keys[0]} to print a resolved configuration")
        print(dump_config(load_config(options.config, overrides)), end="")
        return 0
    for key in keys or [""]:
        print(_defaults(key))
    return 0


def _defaults(key: str) -> str:
    try:
        return template(key)
    except KeyError:
        near = " or ".join(suggest_keys(key.rpartition(".")[2]))
        cure = f" (did you mean {near}?)" if near else "; `megatron-oprd config` prints all keys"
        raise UserError(f"unknown key {key}{cure}") from None


if __name__ == "__main__":
    run_command(main)
