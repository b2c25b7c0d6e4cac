"""Each process on a machine with GPUs has a GPU of its own."""

import pytest
import torch

from megatron_oprd.runtime.platform import choose_device
from megatron_oprd.types import UserError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_the_local_rank_chooses_the_device(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)


def test_more_processes_than_devices_are_refused_with_the_number_that_fits(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"4 processes on this machine share 2 visible .*--nproc-per-node=2"):
        choose_device("cuda")
