"""Measure one update of a run, and compare two updates: loss, gradient norm and the gradient of every parameter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_oprd.hf.export import gather_hf_tensors
from megatron_oprd.hf.load import named_parameters, parameter_table
from megatron_oprd.launch.assemble import Run
from megatron_oprd.parallel.collectives import gather_objects
from megatron_oprd.testing.replayed_run import LEARNING_RATE
from megatron_oprd.training.state import TrainState

LOSS_TOLERANCE = 1e-6
OneStep = Callable[[Run, TrainState], tuple[TrainState, dict[str, float], Any]]  # `megatron_oprd.train.one_step`


@dataclass(frozen=True)
class Update:
    """The result of one step."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    gradients: dict[str, torch.Tensor]  # by Hugging Face name: the change of the weights over -LEARNING_RATE
    # The loss with the absolute value of every token's term; None for a run. Rounding is relative to it, because terms
    # of both signs (`sampled`, `topk_surrogate`) may nearly cancel.
    magnitude: float | None = None


def measure_update(run: Run, one_step: OneStep) -> Update:
    """Take the first step of a run and return the update, with all gradients on rank 0. Collective over the world."""
    parameters = named_parameters(run.student.stage)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _, metrics, _ = one_step(run, TrainState())
    run.student.stage.wait_for_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_((before[name] - parameter) / LEARNING_RATE)
    assert_copies_agree(parameters, run)
    changes = dict(gather_hf_tensors(run.student.stage, run.inputs.setup.student, run.topology))
    return Update(metrics["loss"], metrics["grad_norm"], metrics, changes)


def undo_step(run: Run, one_step: OneStep) -> None:
    """Take a step and put the weights back. Collective over the world."""
    parameters = named_parameters(run.student.stage)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    one_step(run, TrainState())
    run.student.stage.wait_for_parameters()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])


def assert_copies_agree(parameters: dict[str, torch.Tensor], run: Run) -> None:
    """Assert that ranks with the same part of a parameter have the same values, bit for bit."""
    table, topology = parameter_table(run.inputs.setup.student), run.topology
    digests = {}
    for name, parameter in parameters.items():
        entry = table[name]
        digest = hashlib.sha256(parameter.detach().float().contiguous().numpy().tobytes()).hexdigest()
        digests[entry.megatron, topology.tensor_rank if entry.cut else 0, digest] = topology.rank
    owners = {}
    for of_rank in gather_objects(digests, torch.distributed.group.WORLD):
        for (name, shard, digest), rank in of_rank.items():
            first, owner = owners.setdefault((name, shard), (digest, rank))
            assert digest == first, f"{name} differs between ranks {owner} and {rank}"


@dataclass(frozen=True)
class Difference:
    """The relative errors of an update."""

    loss: float
    grad_norm: float
    gradient: float  # the largest of a parameter; infinite if it moved without a gradient, or is missing
    parameter: str  # the parameter with that error
    cosine: float  # the smallest cosine between the gradients of a parameter

    def explain(self, tolerance: float = 1e-5) -> str | None:
        """Return a description of the first error above its tolerance, or None."""
        if not self.loss <= LOSS_TOLERANCE:
            return f"loss: relative error {self.loss:.1e}"
        if not self.gradient <= tolerance:
            return f"{self.parameter}: relative error {self.gradient:.1e}"
        return None if self.grad_norm <= tolerance else f"gradient norm: relative error {self.grad_norm:.1e}"


def difference(actual: Update, expected: Update) -> Difference:
    """Compare the update of rank 0 with the reference. A parameter without a gradient there must not have moved."""
    worst, parameter, cosine = -1.0, "", 1.0
    for name in sorted({*actual.gradients, *expected.gradients}):
        gradient, change = expected.gradients.get(name), actual.gradients.get(name)
        if gradient is None or not gradient.any():
            error = float("inf") if change is not None and change.any() else 0.0
        elif change is None or change.shape != gradient.shape:
            error = float("inf")
        else:
            change, scale = change.double(), gradient.norm()
            error = torch.nan_to_num((change - gradient).norm() / scale, nan=float("inf")).item()
            cosine = min(cosine, ((change * gradient).sum() / (change.norm() * scale).clamp_min(1e-300)).item())
        if error > worst:
            worst, parameter = error, name
    loss = (actual.loss - expected.loss) / (expected.magnitude or expected.loss)
    norm = (actual.grad_norm - expected.grad_norm) / expected.grad_norm
    return Difference(abs(loss), abs(norm), worst, parameter, cosine)


def assert_same_update(actual: Update, expected: Update, tolerance: float = 1e-5) -> None:
    """Assert that loss, gradient norm and every gradient of rank 0 agree with the reference."""
    found = difference(actual, expected)
    assert found.explain(tolerance) is None, found
