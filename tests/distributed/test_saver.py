"""A checkpoint that is written while training goes on holds what there was when it was begun, bit by bit."""

import contextlib
import errno
import pickle
import threading
from unittest import mock

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from megatron_oprd.checkpoint import training_state
from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.checkpoint.sharded_write import PlannedWrite
from megatron_oprd.config import load_config
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from megatron_oprd.types import UserError
from tests.helpers.distributed import run_distributed
from tests.helpers.runs import replay_run


@contextlib.contextmanager
def slow_disk():
    """No rank writes before the event that is yielded is set."""
    may_write, write = threading.Event(), PlannedWrite.write

    def wait_and_write(planned):
        may_write.wait()
        write(planned)

    with mock.patch.object(PlannedWrite, "write", wait_and_write):
        yield may_write


def save(run, state, folder, saver):
    source = run.inputs.config.student.path
    saver.save(folder, run.student, run.inputs.student, run.topology, state, run.identities, source=source, keep=2)


def tensors_of(run):
    """Every tensor of the student and its optimizer that training changes."""
    yield from run.student.stage.parameters()
    for optimizer in run.student.optimizer.chained_optimizers:
        for group in optimizer.optimizer.param_groups:
            yield from group["params"]
        for state in optimizer.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def save_twice(rank, arguments, folder):
    """The same state at once and in the background; there everything changes before the first byte is written."""
    run = build_run(read_inputs(load_config(None, arguments)))
    state, _, _ = one_step(run, TrainState())
    save(run, state, folder / "at_once", Saver(asynchronous=False))
    saver = Saver(asynchronous=True)
    with slow_disk() as may_write:
        save(run, state, folder / "meanwhile", saver)
        with torch.no_grad():
            for tensor in tensors_of(run):
                tensor.add_(1)
        one_step(run, state)
        saver.at_step()
        incomplete = training_state.latest(folder / "meanwhile") is None
        may_write.set()
        saver.wait()
    return incomplete


SETTINGS = {
    "optimizer cut over the ranks": (),
    "optimizer on every rank": ("parallel.distributed_optimizer=false",),
    "bf16, tensor 2": ("precision.dtype=bf16", "parallel.tensor=2", "parallel.distributed_optimizer=false"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_written_later_is_what_there_was(name, tmp_path):
    arguments = replay_run(tmp_path, 2, *SETTINGS[name], num_hidden_layers=2)
    assert run_distributed(2, save_twice, arguments, tmp_path) == [True, True]
    expected, actual = (files(tmp_path / folder / "step_0000001") for folder in ("at_once", "meanwhile"))
    assert expected.keys() == actual.keys()
    for name, content in expected.items():
        assert actual[name] == content, name


def files(folder):
    """Every file, of an index what says where the tensors are: the rest is a name of its own."""
    held = {}
    for path in folder.rglob("*"):
        if path.name == ".metadata":
            index = pickle.loads(path.read_bytes())
            held[str(path.relative_to(folder))] = index.state_dict_metadata, index.storage_data
        elif path.is_file():
            held[str(path.relative_to(folder))] = path.read_bytes()
    return held


def fail_on_one_rank(rank, arguments, folder):
    """A checkpoint, one whose write fails on rank 1, and another; what each rank is told of the second."""
    run = build_run(read_inputs(load_config(None, arguments)))
    saver, said = Saver(asynchronous=True), None
    one_step(run, TrainState())
    save(run, TrainState(1), folder, saver)
    saver.wait()
    full = OSError(errno.ENOSPC, "No space left on device", "/disk/file")
    with mock.patch.object(FileSystemWriter, "write_data", side_effect=full) if rank else contextlib.nullcontext():
        save(run, TrainState(2), folder, saver)
        while said is None:  # a step's end after the other
            try:
                saver.at_step()
            except UserError as error:
                said = str(error)
    torch.distributed.barrier()  # rank 0 clears up
    left = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()
    save(run, TrainState(3), folder, saver)
    saver.wait()
    return said, left


def test_a_full_disk_on_one_rank_is_told_to_all_and_loses_nothing_earlier(tmp_path):
    arguments = replay_run(tmp_path, 2, num_hidden_layers=1)
    told = run_distributed(2, fail_on_one_rank, arguments, tmp_path / "checkpoints")
    assert told[0] == told[1] == ("cannot write /disk/file: No space left on device", ["step_0000001"])
    assert training_state.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step_0000003"
