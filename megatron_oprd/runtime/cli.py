"""What every command does with bad input: one line on stderr, exit code 2, no traceback."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_oprd.runtime.files import DISK_ERRORS
from megatron_oprd.types import UserError


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are a UserError: one line, like every other mistake in the user's input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


class RankFailed(Exception):
    """One rank of several has failed, which is said and on record: its process ends at once. Python's own end would
    wait for process groups that wait for a rank that is gone."""


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Exit with what `main` returns (None is 0), with 130 when interrupted, with 1 for RankFailed.

    A UserError and a disk error (full, read-only, forbidden) become one `error: ...` line on stderr, printed by rank 0
    only in a group of processes, and exit code 2.
    """
    try:
        code = main() or 0
    except UserError as error:
        code = _report(str(error))
    except RankFailed:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        code = _report(f"{error.filename or 'disk'}: {error.strerror}")
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _report(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.flush()
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
