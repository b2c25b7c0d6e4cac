"""The command line of every command. A mistake of the user is one line on stderr with exit code 2, no traceback.

A command checks its arguments and its configuration before it imports torch and Megatron-Core, so nothing here may
import them.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from megatron_oprd.config import Config, load_config
from megatron_oprd.config.hints import suggest_keys
from megatron_oprd.runtime import start_profile
from megatron_oprd.runtime.files import DISK_ERRORS, disk_advice
from megatron_oprd.types import ServiceFailed, UserError

STOPPED = 3  # exit code of a run that the health watch ended
PLAN_DEVICES = ("h100", "h200")  # the GPUs for which `planning/hardware.py` has a data sheet
CONFIG_HELP = "YAML file; `megatron-oprd config` lists the keys"
MISTAKE = 2  # the exit code after a mistake of the user
SECONDS_FOR_RANK_ZERO = 5.0  # the time that rank 0 has to print a mistake before another rank exits


class ArgumentParser(argparse.ArgumentParser):
    """argparse.ArgumentParser that raises UserError for a wrong argument and takes options in any place."""

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        """Parse the arguments, with options and `key=value` in any order."""
        namespace, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            raise UserError(self._explain_unknown(unknown[0]))
        return namespace

    def _explain_unknown(self, argument: str) -> str:
        name, _, value = argument.partition("=")
        if not name.startswith("-"):
            return f"unexpected argument {argument} (see --help)"
        options = [option for option in self._option_string_actions if option.startswith("--")]
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        if near:
            return f"unknown option {name} (did you mean {near[0]}?)"
        key = name.strip("-")
        if any(action.dest == "overrides" for action in self._actions):
            suggested = suggest_keys(key.replace("-", "_")) or [key]
            keys = " or ".join(f"{found}={value or 'VALUE'}" for found in suggested)
            return f"unknown option {name}; a configuration key has no dashes: {keys}"
        return f"unknown option {name}; options: {', '.join(options)}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class RankFailed(Exception):
    """A rank of several has failed, the failure is reported and recorded, and this process has to end at once.

    A normal exit of Python would wait for process groups that wait for the failed rank.
    """


def command_parser(name: str, description: str, *, override: str, config: str = CONFIG_HELP) -> ArgumentParser:
    """Build the parser of `megatron-oprd <name> --config F [a.b=1 ...]`.

    `override` is the example of an override in the help text, `config` the help text of `--config`.
    """
    parser = ArgumentParser(prog=f"megatron-oprd {name}", description=description)
    parser.add_argument("--config", metavar="FILE", help=config)
    shown = f"replaces a key of the file, like {override}"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=shown)
    return parser


def read_options(options: argparse.Namespace) -> Config:
    """Return the configuration that the options of `command_parser` name. Raises UserError for a mistake in it."""
    return load_config(options.config, options.overrides)


def add_plan_options(parser: ArgumentParser) -> None:
    """Add the options of a plan."""
    parser.add_argument("--device", choices=PLAN_DEVICES, help="plan for this GPU instead of this machine's device")
    parser.add_argument("--details", action="store_true", help="the plan also has every key, pair of layers and cost")


def check_command_line(parser: ArgumentParser, read: Callable[[argparse.Namespace], Config] = read_options) -> None:
    """Check the arguments and the configuration of this process, then print that the program is loading.

    A command calls this function before it imports torch and Megatron-Core, so that `--help` and a wrong key are
    answered within a second. Exits with code 2 on a mistake.

    Args:
        parser: what `command_parser` returned.
        read: the function that reads the configuration from the options.
    """
    with exit_on_mistake():
        options = parser.parse_args()
        start_profile.begin(getattr(options, "profile_start", False))
        read(options)
    start_loading()


def start_loading() -> None:
    """Print on rank 0 that the slow imports begin, then import torch and Megatron-Core.

    Python's garbage collector is off until `end_loading`: it would search the growing heap for seconds in vain.
    """
    gc.disable()
    if _is_rank_zero():
        print("loading PyTorch and Megatron-Core ...", flush=True)
    start_profile.enter("import torch and Megatron-Core")
    from megatron_oprd.runtime.megatron_import import import_megatron

    import_megatron()
    start_profile.enter("import the other packages")


def end_loading() -> None:
    """Switch the garbage collector on again, for the objects that are made from now on."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and exit with its return value (None is 0), or as `exit_on_mistake` does if it raises."""
    end_loading()
    with exit_on_mistake():
        code = main() or 0
    sys.exit(code)


@contextmanager
def exit_on_mistake() -> Iterator[None]:
    """Exit with code 2 on a mistake of the user, with 130 on an interrupt, with 1 on RankFailed and ServiceFailed.

    A UserError, a ServiceFailed and a disk error (full, read-only, forbidden) become one `error: ...` line on stderr.
    In a group of processes only rank 0 prints the line. Any other exception keeps its traceback.
    """
    try:
        yield
    except UserError as error:
        code = _report(str(error))
    except ServiceFailed as error:
        _report(str(error))
        code = 1
    except RankFailed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = _report(f"{error.filename or 'disk'}: {error.strerror}{disk_advice(error)}")
    except KeyboardInterrupt:
        code = 130
    else:
        return
    sys.exit(code)


def _report(message: str) -> int:
    if _is_rank_zero():
        sys.stdout.flush()
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun ends all ranks when the first one exits. It must not end rank 0 before that has printed the line.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_RANK_ZERO)
    return MISTAKE


def _is_rank_zero() -> bool:
    return os.environ.get("RANK", "0") == "0"
