"""A mistake of the user is printed by rank 0, which torchrun must not end before that."""

import signal
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_oprd import torchrun as command
from megatron_oprd.runtime import cli
from megatron_oprd.types import UserError


@pytest.fixture
def waited(monkeypatch):
    """Return the seconds that the process sleeps, instead of sleeping."""
    seconds = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    before = signal.getsignal(signal.SIGTERM)
    yield seconds
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("rank", "torchrun", "printed", "seconds"),
    [
        ("0", True, "error: no such key\n", []),
        ("1", True, "", [cli.SECONDS_FOR_RANK_ZERO]),
        ("1", False, "", []),
    ],
)
def test_other_ranks_of_torchrun_wait_until_rank_0_has_printed(
    rank, torchrun, printed, seconds, monkeypatch, capsys, waited
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with pytest.raises(SystemExit) as stop, cli.exit_on_mistake():
        raise UserError("no such key")
    assert stop.value.code == 2
    assert capsys.readouterr().err == printed
    assert waited == seconds


@pytest.mark.parametrize(("exit_code", "result"), [(cli.MISTAKE, cli.MISTAKE), (1, ChildFailedError)])
def test_the_command_torchrun_ends_like_a_process_after_a_mistake(exit_code, result, monkeypatch):
    def fail(arguments):
        raise ChildFailedError("ranks", {0: ProcessFailure(0, 1, exit_code, "<N/A>")})

    monkeypatch.setattr(command.run, "main", fail)
    before = signal.getsignal(signal.SIGINT)
    try:
        if result is ChildFailedError:
            with pytest.raises(ChildFailedError):
                command.main([])
        else:
            assert command.main([]) == result
    finally:
        signal.signal(signal.SIGINT, before)
