"""Ranks agree on received signals, on the slowest device and on the rank that failed first."""

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
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.types import UserError

CPU = torch.device("cpu")


class Captured:
    """Redirects what this process writes to a file descriptor into a file."""

    def __init__(self, descriptor: int, path: Path) -> None:
        self.path, self._descriptor, self._before = path, descriptor, os.dup(descriptor)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)

    def text(self) -> str:
        os.dup2(self._before, self._descriptor)
        return self.path.read_text()


def _signals_and_stragglers(rank: int, folder: Path) -> tuple[list[str | None], list[dict[str, float]], str]:
    start_process(CPU)
    topology = build_topology(ParallelConfig(), CPU, seed=0)
    with signals.handle_signals():
        received = [signals.received_by_any(topology, 0)]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        received.append(signals.received_by_any(topology, 1))
    straggler.time_products = lambda device: 1.0 + 2.0 * (rank == 1)
    out = Captured(1, folder / f"stdout-{rank}")
    config = WatchdogConfig(straggler_every=2, straggler_ratio=2.5)
    measured = [straggler.measure_straggler(config, topology, step) for step in (1, 2)]
    measured.append(straggler.measure_straggler(WatchdogConfig(straggler_every=1, straggler_ratio=3.5), topology, 1))
    measured.append(straggler.measure_straggler(WatchdogConfig(), topology, 2))
    return received, measured, out.text()


def test_all_ranks_learn_of_a_signal_and_rank_0_names_a_slow_rank(tmp_path):
    for rank, (received, measured, out) in enumerate(run_distributed(2, _signals_and_stragglers, tmp_path)):
        assert received == [None, "SIGUSR1"]
        assert measured == [{}, {"straggler/ratio": 3.0}, {"straggler/ratio": 3.0}, {}]
        warning = re.fullmatch(r"warning: rank 1 on \S+ needs 3\.00 times as long as the median rank .*=2\.5\)\n", out)
        assert warning if rank == 0 else out == ""


def _refused(rank: int, folder: Path) -> tuple[str, str]:
    """Rank 1 alone raises a UserError; rank 0 then loses its connection."""
    err = Captured(2, folder / f"stderr-{rank}")
    try:
        with guarded(WatchdogConfig(heartbeat_seconds=0.0), folder / "run"):
            if rank == 1:
                raise UserError("prompt 7 is empty")
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    except Exception as error:
        return type(error).__name__, err.text()


def test_a_user_error_of_one_rank_is_printed_by_it_and_named_by_the_others(tmp_path):
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


def test_a_user_error_of_all_ranks_leaves_no_record(tmp_path):
    assert run_distributed(2, _refused_by_all, tmp_path) == [False, False]
    assert not (tmp_path / "run").exists()
