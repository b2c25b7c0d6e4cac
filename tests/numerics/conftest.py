"""Fixture: a layout of one process."""

import pytest

from megatron_oprd.config import ParallelConfig
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.platform import choose_device


@pytest.fixture(scope="module")
def topology():
    device = choose_device("auto")
    start_process(device)
    return build_topology(ParallelConfig(), device, seed=0)
