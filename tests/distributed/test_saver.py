"""A checkpoint written while training continues equals, bit for bit, the state at the time of `save`."""

import contextlib
import errno
import pickle
import threading
import time
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.checkpoint.sharded_write import PlannedWrite
from megatron_oprd.checkpoint.training_state import latest_checkpoint
from megatron_oprd.config import CheckpointConfig, load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import UserError
from tests.helpers.runs import replay_run


@contextlib.contextmanager
def slow_disk():
    """Let each rank write only after the yielded event is set."""
    may_write, write = threading.Event(), PlannedWrite.write

    def wait_and_write(planned):
        may_write.wait()
        write(planned)

    with mock.patch.object(PlannedWrite, "write", wait_and_write):
        yield may_write


def make_saver(run, folder, *, asynchronous):
    return Saver(folder, run.checkpoint_content, CheckpointConfig(keep=2, asynchronous=asynchronous))


def tensors_of(run):
    """Yield every tensor of the student and its optimizer that training changes."""
    yield from run.student.stage.parameters()
    if run.student.average is not None:
        yield from (one.values for one in run.student.average.parameters.values())
    for optimizer in run.student.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def save_twice(rank, arguments, folder):
    """Save a state at once, then in the background, where all tensors change before the first byte is written."""
    run = build_run(read_inputs(load_config(None, arguments)))
    state, _, _ = one_step(run, TrainState())
    make_saver(run, folder / "at_once", asynchronous=False).save(state)
    saver = make_saver(run, folder / "meanwhile", asynchronous=True)
    with slow_disk() as may_write:
        saver.save(state)
        with torch.no_grad():
            for tensor in tensors_of(run):
                tensor.add_(1)
        one_step(run, state)
        saver.after_step()
        incomplete = latest_checkpoint(folder / "meanwhile") is None
        may_write.set()
        saver.wait()
    return incomplete


SETTINGS = {
    "optimizer and average cut over the ranks": ("teacher.ema=0.9",),
    "optimizer on every rank": ("parallel.distributed_optimizer=false",),
    "bf16, tensor 2": ("precision.dtype=bf16", "parallel.tensor=2", "parallel.distributed_optimizer=false"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_an_asynchronous_checkpoint_equals_the_state_at_the_time_of_saving(name, tmp_path):
    arguments = replay_run(tmp_path, 2, *SETTINGS[name], num_hidden_layers=2)
    assert run_distributed(2, save_twice, arguments, tmp_path) == [True, True]
    expected, actual = (files(tmp_path / folder / "step_0000001") for folder in ("at_once", "meanwhile"))
    assert expected.keys() == actual.keys()
    for name, content in expected.items():
        assert actual[name] == content, name


def files(folder):
    """Return the content of every file. Of an index, only the tensors' places: the rest contains a unique name."""
    contents = {}
    for path in folder.rglob("*"):
        if path.name == ".metadata":
            index = pickle.loads(path.read_bytes())
            contents[str(path.relative_to(folder))] = index.state_dict_metadata, index.storage_data
        elif path.is_file():
            contents[str(path.relative_to(folder))] = path.read_bytes()
    return contents


def find_overdue(rank, arguments, folder):
    """Return the answers of `is_overdue` when rank 1's, then rank 0's, and then no rank's last checkpoint is old."""
    content = build_run(read_inputs(load_config(None, arguments))).checkpoint_content
    saver = Saver(folder, content, CheckpointConfig(every=0, every_minutes=1.0))
    answers = []
    for old_rank in (1, 0, None):
        saver._last_save = time.monotonic() - (61 if rank == old_rank else 0)
        answers.append(saver.is_overdue())
    return answers


def test_the_clock_of_rank_0_decides_when_all_ranks_save(tmp_path):
    arguments = replay_run(tmp_path, 1, num_hidden_layers=1)
    assert run_distributed(2, find_overdue, arguments, tmp_path) == [[False, True, False]] * 2


def fail_on_one_rank(rank, arguments, folder):
    """Save three checkpoints, the second of which fails on rank 1, and return the error and the folders after it."""
    run = build_run(read_inputs(load_config(None, arguments)))
    saver, message = make_saver(run, folder, asynchronous=True), None
    one_step(run, TrainState())
    saver.save(TrainState(1))
    saver.wait()
    full = OSError(errno.ENOSPC, "No space left on device", "/disk/file")
    with mock.patch.object(FileSystemWriter, "write_data", side_effect=full) if rank else contextlib.nullcontext():
        saver.save(TrainState(2))
        while message is None:  # as at the ends of later steps
            try:
                saver.after_step()
            except UserError as error:
                message = str(error)
    torch.distributed.barrier()  # rank 0 removes the failed checkpoint
    left = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    saver.save(TrainState(3))
    saver.wait()
    return message, left


def test_a_full_disk_of_one_rank_raises_on_all_ranks_and_keeps_earlier_checkpoints(tmp_path):
    arguments = replay_run(tmp_path, 2, num_hidden_layers=1)
    messages = run_distributed(2, fail_on_one_rank, arguments, tmp_path / "checkpoints")
    assert (
        messages[0]
        == messages[1]
        == (
            "cannot write /disk/file: No space left on device; free some space or name another folder",
            ["step_0000001"],
        )
    )
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_0000003"
