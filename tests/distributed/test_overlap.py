"""Overlapped communication is complete before its results are used. (`test_layouts.py` checks the gradients.)

Parameters are gathered as late as possible: nothing is gathered until someone waits, so that code that does not wait
sees the parameters of the step before.
"""

import contextlib
from unittest import mock

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

from megatron_oprd.config import load_config
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.launch.assemble import build_run
from megatron_oprd.launch.inputs import read_inputs
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.train import finish, fit, one_step
from megatron_oprd.training.overlap import wait_for_gather
from megatron_oprd.training.state import TrainState
from tests.helpers.layouts import parse
from tests.helpers.run_layouts import References, rollouts_of
from tests.helpers.runs import assert_same_export, in_folder, metrics, prompt_run
from tests.helpers.training import ADAM_EPSILON, make_run, small_buckets

OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
ADAMW = ("optimizer.name=adamw", "optimizer.weight_decay=0", "optimizer.clip_grad=0")


class LateGather:
    """A handle whose communication happens in `wait`."""

    def __init__(self, group, gather):
        self.group, self.gather = group, gather

    def wait(self):
        self.group.param_gather_handle = None
        self.gather(self.group, force_sync=True)


@contextlib.contextmanager
def late_gathers():
    gather = BucketGroup.start_param_sync

    def start(group, force_sync=False):
        if force_sync or not group.ddp_config.overlap_param_gather:
            return gather(group, force_sync)
        assert group.param_gather_handle is None
        group.param_gather_handle, group.param_gather_dispatched = LateGather(group, gather), True

    with mock.patch.object(BucketGroup, "start_param_sync", start):
        yield


@contextlib.contextmanager
def counting_reductions():
    """Yield a list with True for each bucket whose reduction had started before the end of backward."""
    finish, started = BucketGroup.finish_grad_sync, []

    def count_and_finish(group, **options):
        started.append(group.grad_reduce_handle is not None)
        finish(group, **options)

    with mock.patch.object(BucketGroup, "finish_grad_sync", count_and_finish):
        yield started


def parameters_after_steps(rank, case, student, teacher, overlap):
    """Return the losses of three steps, this rank's weights, and the buckets that the last backward did not reduce."""
    rollouts = rollouts_of(case.rollouts)
    with small_buckets(), late_gathers():
        small_steps = (f"optimizer.lr={0.1 * ADAM_EPSILON}", f"optimizer.eps={ADAM_EPSILON}")
        run = make_run(student, teacher, *case.overrides, *ADAMW, *overlap, *small_steps, rollouts=rollouts)
        losses = [one_step(run, TrainState())[1]["loss"] for _ in range(2)]
        with counting_reductions() as started:
            losses.append(one_step(run, TrainState())[1]["loss"])
    wait_for_gather(run.student.ddp)
    weights = {name: parameter.detach().numpy() for name, parameter in named_parameters(run.student.stage).items()}
    return losses, weights, started.count(False)


# The second: how many buckets on each rank wait for no gradient, and are reduced at the end: that of an LM head.
@pytest.mark.parametrize(("line", "at_the_end"), [("4 qwen3 tp2 sp reverse", 1), ("4 qwen2 pp2 vp2 tied 4of4 many", 0)])
def test_overlap_does_not_change_the_steps_of_adamw(line, at_the_end, tmp_path):
    case = parse(line)
    models = References(tmp_path).models(case)
    expected = run_distributed(case.world, parameters_after_steps, case, *models, ())
    actual = run_distributed(case.world, parameters_after_steps, case, *models, OVERLAP)
    for (losses, weights, late), (their_losses, their_weights, _) in zip(actual, expected, strict=True):
        assert losses == their_losses and len(set(losses)) == len(losses)
        assert late == at_the_end
        for name, weight in weights.items():
            assert torch.equal(torch.from_numpy(weight), torch.from_numpy(their_weights[name])), name


def train(rank, arguments, gathers=late_gathers):
    with small_buckets(), gathers():
        run = build_run(read_inputs(load_config(None, arguments)))
        fit(run)
        finish(run)


# The first reader of the weights after each of three steps: checkpoint, evaluation, health watch; then the export.
READERS = {
    "all": ("checkpoint.every=1", "evaluation.every=2", "health.every=3", "health.prompts=2", "checkpoint.keep=9"),
    "export": ("checkpoint.every=0",),
}


@pytest.mark.parametrize("readers", READERS)
def test_every_reader_of_the_student_sees_the_updated_weights(readers, tmp_path):
    arguments = prompt_run(tmp_path, 3, *ADAMW, "optimizer.lr=0.01", *READERS[readers], num_hidden_layers=2)
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    run_distributed(2, train, in_folder(arguments, plain))
    run_distributed(2, train, [*in_folder(arguments, overlapped), *OVERLAP])

    for actual, expected in zip(metrics(overlapped), metrics(plain), strict=True):
        # A norm is summed bucket by bucket: in another order.
        assert actual.pop("grad_norm") == pytest.approx(expected.pop("grad_norm"), rel=1e-6)
        assert actual == expected
    assert_same_export(overlapped, plain)
    written = [*plain.glob("checkpoints/*/*/*.distcp"), *plain.glob("rollouts/*"), *plain.glob("evaluations/*")]
    assert len(written) == {"all": 2 * 2 * 3 + 3 + 3, "export": 3}[readers]
    for file in written:
        assert (overlapped / file.relative_to(plain)).read_bytes() == file.read_bytes(), file


def test_a_replica_without_prompts_does_not_block_the_others(tmp_path):
    arguments = prompt_run(
        tmp_path, 2, *OVERLAP, "rollout.prompts_per_step=1", "checkpoint.every=0", num_hidden_layers=1
    )
    run_distributed(2, train, arguments, contextlib.nullcontext, timeout_seconds=60)
    assert len(metrics(tmp_path / "run")) == 2
