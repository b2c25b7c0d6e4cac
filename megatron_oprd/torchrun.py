"""torchrun with a Ctrl-C that lets the run save: python -m megatron_oprd.torchrun [the arguments of torchrun].

torchrun itself answers Ctrl-C with a traceback, gives its ranks 30 seconds, and exits with 1. This command forwards the
interrupt to the ranks and waits for them. A second Ctrl-C ends them at once. After a mistake of the user, which rank 0
has printed, it exits with 2 like a single process, and without torchrun's traceback.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType

import psutil
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_oprd.runtime.cli import MISTAKE, run_command

INTERRUPTED = 128 + signal.SIGINT  # the exit code that shells use


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun. Return 0, INTERRUPTED if Ctrl-C ended the ranks, or MISTAKE if they found one.

    Raises ChildFailedError, as torchrun does, if a rank ends in another way.
    """
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += 1
        ranks = psutil.Process().children()
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, number)
        if interrupts > 1 or not ranks:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, forward)
    try:
        run.main(["--signals-to-handle=SIGTERM,SIGHUP,SIGQUIT", *(sys.argv[1:] if arguments is None else arguments)])
    except ChildFailedError as error:
        if interrupts:
            return INTERRUPTED
        if error.get_first_failure()[1].exitcode == MISTAKE:
            return MISTAKE
        raise
    except KeyboardInterrupt:
        if not interrupts:
            raise
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    run_command(main)
