"""What the ranks of a run tell each other of signals, slow devices and failures."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import torch

from megatron_oprd.config import ParallelConfig, WatchdogConfig
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.resilience import signals, straggler
from megatron_oprd.resilience.guard import guarded
from megatron_oprd.types import UserError
from tests.helpers.distributed import run_distributed

CPU = torch.device("cpu")


class Captured:
    """What this process writes to a descriptor, in a file."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path, self._descriptor, self._before = path, descriptor, os.dup(descriptor)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)

    def text(self) -> str:
        os.dup2(self._before, self._descriptor)
        return self.path.read_text()


def _signals_and_stragglers(rank: int, folder: Path) -> tuple[list[str | None], list[dict[str, float]], str]:
    start_process(CPU)
    topology = build_topology(ParallelConfig(), CPU, seed=0)
    with signals.noting():
        noted = [signals.noted_by_any(topology)]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        noted.append(signals.noted_by_any(topology))
    straggler.seconds_of_work = lambda device: 1.0 + 2.0 * (rank == 1)
    out = Captured(1, folder / f"stdout-{rank}")
    config = WatchdogConfig(straggler_every=2, straggler_ratio=2.5)
    measured = [straggler.after_step(config, topology, step) for step in (1, 2)]
    measured.append(straggler.after_step(WatchdogConfig(straggler_every=1, straggler_ratio=3.5), topology, 1))
    measured.append(straggler.after_step(WatchdogConfig(), topology, 2))
    return noted, measured, out.text()


def test_a_signal_is_noted_by_all_and_a_slow_rank_named_by_the_first(tmp_path):
    for rank, (noted, measured, out) in enumerate(run_distributed(2, _signals_and_stragglers, tmp_path)):
        assert noted == [None, "SIGUSR1"]
        assert measured == [{}, {"straggler/ratio": 3.0}, {"straggler/ratio": 3.0}, {}]
        told = re.fullmatch(r"warning: rank 1 on \S+ needs 3\.00 times as long as the median rank .*=2\.5\)\n", out)
        assert told if rank == 0 else out == ""


def _refused(rank: int, folder: Path) -> tuple[str, str]:
    """Rank 1 alone raises a UserError, then rank 0 for all, while the others follow."""
    err = Captured(2, folder / f"stderr-{rank}")
    try:
        with guarded(WatchdogConfig(heartbeat_seconds=0.0), folder / "run"):
            if rank == 1:
                raise UserError("prompt 7 is empty")
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    except Exception as error:
        return type(error).__name__, err.text()


def test_a_mistake_that_one_rank_alone_sees_is_said_by_it_and_named_by_the_others(tmp_path):
    first, second = run_distributed(2, _refused, tmp_path)
    assert second == ("UserError", "error: prompt 7 is empty\n")
    assert first[0] == "RankFailed"
    assert re.fullmatch(r"error: rank 0 ends, as rank 1 on \S+ failed first, in .*: prompt 7 is empty\n", first[1])


def _refused_by_all(rank: int, folder: Path) -> bool:
    def refuse() -> None:
        raise UserError("no")

    with pytest.raises(UserError), guarded(WatchdogConfig(), folder / "run"):
        on_rank_zero(refuse)
    return (folder / "run" / "failures").exists()


def test_a_mistake_that_all_see_leaves_no_record(tmp_path):
    assert run_distributed(2, _refused_by_all, tmp_path) == [False, False]
    assert not (tmp_path / "run").exists()
