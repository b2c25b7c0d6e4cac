"""Fixtures for one process on one GPU with Transformer Engine; without either the folder is skipped.

With tests/helpers/te_on_cpu first on PYTHONPATH the folder runs on a CPU, with Megatron-Core's own modules over a
stand-in for Transformer Engine. This shows that the tests work, not what a GPU does.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
import torch

from megatron_oprd.config import ParallelConfig
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime.environment import Machine, find_machine
from megatron_oprd.runtime.platform import choose_device
from tests.gpu.models import Gpu


def reason_to_skip() -> str | None:
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if has_te and importlib.util.find_spec("transformer_engine.on_cpu") is not None:
        return None  # the stand-in
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if has_te else "Transformer Engine is not installed"


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Gpu:
    """Return the device and layout of the tests' models."""
    reason = reason_to_skip()
    if reason:
        pytest.skip(reason)
    device = choose_device("auto")
    start_process(device)
    return Gpu(build_topology(ParallelConfig(), device, seed=0), machine())


@pytest.fixture(scope="session")
def on_cuda(gpu: Gpu) -> None:
    """Skip a test that needs a real device."""
    if gpu.topology.device.type != "cuda":
        pytest.skip("no CUDA device: memory is that of the allocator, and a whole run that of CI")


def machine() -> Machine:
    """Return this machine; over the stand-in, an H100."""
    found = find_machine()
    return found if found.capability else replace(found, capability=(9, 0), cuda=(13, 0))
