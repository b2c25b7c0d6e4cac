"""An optimizer with part of its state in CPU memory makes the same updates, and resumes exactly from a checkpoint.

The test needs no GPU: tensors outside of pinned memory stand for GPU tensors.
"""

import contextlib
from unittest import mock

import torch
from megatron.core.optimizer import distrib_optimizer, optimizer_config
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_oprd.checkpoint.saver import Saver
from megatron_oprd.checkpoint.training_state import latest_checkpoint, load_checkpoint
from megatron_oprd.config import CheckpointConfig
from megatron_oprd.hf.load import named_parameters
from megatron_oprd.testing.distributed import run_distributed
from megatron_oprd.train import one_step
from megatron_oprd.training.state import TrainState
from tests.helpers.layouts import parse
from tests.helpers.run_layouts import References, rollouts_of
from tests.helpers.training import ADAM_EPSILON, make_run

SETTINGS = (
    "optimizer.name=adamw",
    "optimizer.weight_decay=0",
    f"optimizer.lr={0.1 * ADAM_EPSILON}",
    f"optimizer.eps={ADAM_EPSILON}",
    "precision.dtype=bf16",
)


@contextlib.contextmanager
def pretended_gpu():
    """Make mcore's offloading optimizer take CPU tensors for GPU tensors, except those marked `on_host`."""
    divide, gradients = HybridDeviceOptimizer._get_sub_optimizer_param_groups, "_set_sub_optimizer_grads"
    set_gradients, empty = getattr(HybridDeviceOptimizer, gradients), torch.empty

    def on_host(name):
        """Patch a tensor method so that its result inherits the mark `on_host` of the tensor."""
        method = getattr(torch.Tensor, name)

        def keep_place(tensor, *args, **kwargs):
            result = method(tensor, *args, **kwargs)
            result.on_host = name == "pin_memory" or getattr(tensor, "on_host", False)
            return result

        return mock.patch.object(torch.Tensor, name, keep_place)

    def divide_by_place(optimizer, fraction):
        is_cuda = property(lambda tensor: not getattr(tensor, "on_host", False))
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor.view_as(tensor)))
            for name in ("pin_memory", "detach", "clone", "float"):
                patches.enter_context(on_host(name))
            patches.enter_context(mock.patch.object(torch.Tensor, "is_cuda", is_cuda, create=True))
            return divide(optimizer, fraction)

    def set_unpinned(optimizer):
        with mock.patch.object(torch, "empty", lambda *size, pin_memory=False, **kwargs: empty(*size, **kwargs)):
            return set_gradients(optimizer)

    with (
        mock.patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", divide_by_place),
        mock.patch.object(HybridDeviceOptimizer, gradients, set_unpinned),
        mock.patch.object(optimizer_config, "is_te_min_version", lambda version: True),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
    ):
        yield


def weights_of(run):
    return {name: one.detach().float().numpy() for name, one in named_parameters(run.student.stage).items()}


def three_steps(rank, student, teacher, folder, *settings):
    """Return losses and weights of three steps, and of the third step repeated from the checkpoint before it."""
    with pretended_gpu() if settings else contextlib.nullcontext():
        run = make_run(student, teacher, *SETTINGS, *settings, rollouts=rollouts_of("some"))
        losses = [one_step(run, TrainState())[1]["loss"] for _ in range(2)]
        Saver(folder, run.checkpoint_content, CheckpointConfig(keep=1, asynchronous=False)).save(TrainState(2))
        losses.append(one_step(run, TrainState())[1]["loss"])
        weights = weights_of(run)
        run = make_run(student, teacher, *SETTINGS, *settings, rollouts=rollouts_of("some"))
        load_checkpoint(latest_checkpoint(folder), run.checkpoint_content)
        again = one_step(run, TrainState())[1]["loss"]
        inner = run.student.optimizer.chained_optimizers[0].optimizer
        offloaded = len(inner.cpu_optimizers) if settings else 0
    return losses, weights, (again, weights_of(run)), offloaded


def test_optimizer_state_in_cpu_memory_changes_no_result(tmp_path):
    case = parse("2 qwen3 some")
    models = References(tmp_path).models(case)
    plain = run_distributed(2, three_steps, *models, tmp_path / "plain")
    offloaded = run_distributed(2, three_steps, *models, tmp_path / "offloaded", "optimizer.cpu_offload=0.5")
    for expected, actual in zip(plain, offloaded, strict=True):
        assert actual[3] > 0 and expected[3] == 0
        for losses, weights, (again, weights_again), _ in (expected, actual):
            assert losses == expected[0] and len(set(losses)) == 3
            assert again == losses[2]
            for name, weight in expected[1].items():
                assert (weights[name] == weight).all(), name
                assert (weights_again[name] == weight).all(), name
