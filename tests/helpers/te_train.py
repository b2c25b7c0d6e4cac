"""The training command on a machine with Transformer Engine and an H100, as far as the configuration can tell.

To be started with the stand-in (tests/helpers/te_on_cpu) first on PYTHONPATH.
"""

import sys
from unittest import mock

from megatron_oprd import train
from megatron_oprd.launch import setup
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.environment import Machine

if __name__ == "__main__":
    with mock.patch.object(setup, "find_machine", lambda: Machine("2.11.0", (9, 0), (13, 0))):
        run_command(lambda: train.main(sys.argv[1:]))
