"""A forward pass reads no value back from its device: each such read makes the CPU wait for all work on the GPU."""

import dataclasses
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_oprd.launch.step_data import make_global_batch
from megatron_oprd.testing.models import random_hf_model, save
from megatron_oprd.testing.replayed_run import some_rollouts
from megatron_oprd.training import schedule, student_step
from megatron_oprd.training import teacher_pass as passes
from tests.helpers.training import make_run

# Functions that copy values from a tensor to the CPU, or whose result has a size that depends on the values.
READERS = {
    "tolist", "item", "numpy", "cpu", "nonzero", "masked_select", "unique", "bincount", "equal", "allclose",
    "__bool__", "__int__", "__float__", "__index__", "__contains__", "__array__", "__iter__",
}  # fmt: skip
OUTPUT = ("loss.output.objective=full_kl", "loss.output.chunk_tokens=3")
CASES = {
    "layers": (),
    "layers and output": OUTPUT,
    "two teachers": (*OUTPUT, "rollout.prompts_per_step=5"),
    "recomputation": ("recompute.granularity=full",),
}


class ReadBacks(TorchFunctionMode):
    """Records each call inside the block that copies values of a tensor to the CPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        is_mask = name == "__getitem__" and any(
            isinstance(part, torch.Tensor) and part.dtype == torch.bool
            for part in (args[1] if isinstance(args[1], tuple) else (args[1],))
        )
        if name in READERS or is_mask:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


class WaitingOperators(TorchDispatchMode):
    """Records each operator inside the block for which the CPU waits, also those that autograd calls in backward."""

    names = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and isinstance(args[1], (list, tuple))
        by_mask = by_mask and any(isinstance(one, torch.Tensor) and one.dtype == torch.bool for one in args[1])
        if name in self.names or by_mask:
            self.calls.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [save(random_hf_model("Qwen3", seed, num_hidden_layers=2), folder / str(seed)) for seed in range(3)]


@pytest.mark.parametrize("case", CASES)
def test_a_forward_pass_reads_nothing_back_from_the_device(models, case):
    student, first, second = models
    rollouts, teacher = some_rollouts(131), first
    if case == "two teachers":
        teacher = {"math": first, "code": second}
        sources = ("math", "code")
        rollouts = [dataclasses.replace(one, data_source=sources[n % 2]) for n, one in enumerate(rollouts)]
    run = make_run(student, teacher, *CASES[case], rollouts=rollouts)
    global_batch = make_global_batch(run.inputs, rollouts)
    micro_batches = global_batch.micro_batches(run.topology)
    # Metrics are left out: those of top-k look for equal logits, whose number only the device knows.
    loss, output = global_batch.loss, run.output_loss(0, with_metrics=False)
    read_backs, operators = ReadBacks(), WaitingOperators()

    def run_and_record(*arguments):
        with read_backs, operators:
            schedule.run_schedule(*arguments)

    with (
        mock.patch.object(passes, "run_schedule", run_and_record),
        mock.patch.object(student_step, "run_schedule", run_and_record),
    ):
        targets, _ = passes.teacher_pass(run.teachers, global_batch, micro_batches, run.topology)
        taps = (
            student_step.stage_loss(run.student, loss, batch, targets.of(number), output)
            for number, batch in enumerate(micro_batches)
        )
        student_step.accumulate_gradients(run.student, micro_batches, taps)
    assert not len(targets)
    assert read_backs.calls == operators.calls == []


@pytest.mark.parametrize(
    "read", [torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero, bool, int, float]
)
def test_a_read_back_is_recorded(read):
    with ReadBacks() as read_backs:
        read(torch.ones(1))
    assert len(read_backs.calls) == 1


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.nonzero, lambda x: x[x > 0]])
def test_an_operator_in_backward_that_waits_is_recorded(read):
    leaf = torch.ones(1, requires_grad=True)
    output = leaf * 2
    output.register_hook(lambda gradient: (read(gradient), None)[1])
    with WaitingOperators() as operators:
        output.backward()
    assert operators.calls


def test_a_selection_by_mask_is_recorded():
    with ReadBacks() as read_backs:
        torch.arange(3)[torch.tensor([True, False, True])]
    assert read_backs.calls == ["__getitem__"]
