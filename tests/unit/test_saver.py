"""At most one checkpoint is in flight. Each is finished once: after a step, before the next, or at the end."""

from pathlib import Path

import pytest

from megatron_oprd.checkpoint import saver as saver_module
from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.config import CheckpointConfig
from megatron_oprd.types import UserError


class Recorded:
    """Replaces `Saving` and records the calls."""

    events: list
    written = False
    fails = False

    def __init__(self, folder, content, step, *, keep, asynchronous):
        self.step, self.target = step, f"step_{step}"
        self.events.append(("begin", step, asynchronous))

    def is_written(self):
        return self.written

    def finish(self):
        self.events.append(("finish", self.step))
        if self.fails:
            raise UserError("cannot write")


@pytest.fixture
def saving(monkeypatch):
    kind = type("Saving", (Recorded,), {"events": []})
    monkeypatch.setattr(saver_module, "Saving", kind)
    return kind


def test_a_synchronous_checkpoint_is_finished_when_save_returns(saving):
    saver = Saver(Path(), None, CheckpointConfig(keep=1, asynchronous=False))
    assert saver.save(2) == "step_2"
    assert saving.events == [("begin", 2, False), ("finish", 2)]
    saver.after_step()
    saver.wait()
    assert len(saving.events) == 2


def test_saving_and_waiting_finish_the_checkpoint_in_flight(saving):
    saver = Saver(Path(), None, CheckpointConfig(keep=1, asynchronous=True))
    saver.save(2)
    saver.after_step()
    assert saving.events == [("begin", 2, True)]
    saver.save(4)
    assert saving.events[1:] == [("finish", 2), ("begin", 4, True)]
    saver.wait()
    saver.wait()
    assert saving.events[3:] == [("finish", 4)]


def test_after_a_step_a_written_checkpoint_is_finished(saving):
    saver = Saver(Path(), None, CheckpointConfig(keep=1, asynchronous=True))
    saver.save(2)
    saving.written = True
    saver.after_step()
    saver.after_step()
    assert saving.events == [("begin", 2, True), ("finish", 2)]


@pytest.mark.parametrize("finish", ["after_step", "wait"])
def test_a_failed_checkpoint_raises_once(saving, finish):
    saver = Saver(Path(), None, CheckpointConfig(keep=1, asynchronous=True))
    saver.save(2)
    saving.written = saving.fails = True
    with pytest.raises(UserError):
        getattr(saver, finish)()
    saving.fails = False
    saver.save(4)
    saver.wait()
    assert [event for event in saving.events if event[0] == "finish"] == [("finish", 2), ("finish", 4)]
