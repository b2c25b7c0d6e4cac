"""One checkpoint is in flight at a time, and each is finished once: at a step's end, before the next, or at the end."""

import pytest

from megatron_oprd.checkpoint import saver as saver_module
from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.types import UserError


class Recorded:
    """In the place of a checkpoint: says what is done with it."""

    events: list
    written = False
    fails = False

    def __init__(self, step, *, asynchronous):
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


def test_at_once_means_finished_when_save_returns(saving):
    saver = Saver(asynchronous=False)
    assert saver.save(2) == "step_2"
    assert saving.events == [("begin", 2, False), ("finish", 2)]
    saver.at_step()
    saver.wait()
    assert len(saving.events) == 2


def test_the_next_one_waits_for_the_one_before_and_the_end_for_the_last(saving):
    saver = Saver(asynchronous=True)
    saver.save(2)
    saver.at_step()
    assert saving.events == [("begin", 2, True)]
    saver.save(4)
    assert saving.events[1:] == [("finish", 2), ("begin", 4, True)]
    saver.wait()
    saver.wait()
    assert saving.events[3:] == [("finish", 4)]


def test_a_step_finishes_what_all_ranks_have_written(saving):
    saver = Saver(asynchronous=True)
    saver.save(2)
    saving.written = True
    saver.at_step()
    saver.at_step()
    assert saving.events == [("begin", 2, True), ("finish", 2)]


@pytest.mark.parametrize("finish", ["at_step", "wait"])
def test_one_that_failed_is_told_once(saving, finish):
    saver = Saver(asynchronous=True)
    saver.save(2)
    saving.written = saving.fails = True
    with pytest.raises(UserError):
        getattr(saver, finish)()
    saving.fails = False
    saver.save(4)
    saver.wait()
    assert [event for event in saving.events if event[0] == "finish"] == [("finish", 2), ("finish", 4)]
