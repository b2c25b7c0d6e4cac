"""The training command on a machine with Transformer Engine and an H100, as far as the configuration can tell.

usage: python -m tests.helpers.te_train RANKS [a.b=1 ...], with the stand-in (tests/helpers/te_on_cpu) first on
PYTHONPATH. The ranks are forked with their imports done.
"""

import multiprocessing
import os
import socket
import sys
from unittest import mock

from megatron_oprd import train
from megatron_oprd.launch import setup
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.environment import Machine


def run_rank(rank: int, size: int, port: int, arguments: list[str]) -> None:
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in group.items()}, MASTER_ADDR="127.0.0.1")
    with mock.patch.object(setup, "find_machine", lambda: Machine("2.11.0", (9, 0), (13, 0))):
        run_command(lambda: train.main(arguments))


def main(size: int, arguments: list[str]) -> int:
    """Train on `size` ranks, and return the largest exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, size, port, arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    return max(abs(rank.exitcode) for rank in ranks)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
