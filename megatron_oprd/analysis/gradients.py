"""The variance of the gradients of several objectives on the same rollouts.

A rollout's gradient g_i is that of the student's parameters if the batch were this rollout alone. The gradient of the
batch is the mean of all g_i, so norms are enough: no gradient is stored, and every layout works.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_oprd.analysis.objectives import HIDDEN_STATES
from megatron_oprd.config import LossConfig, RepresentationConfig
from megatron_oprd.launch.assemble import Run
from megatron_oprd.models.output_loss import OutputLoss
from megatron_oprd.runtime import cpu_stand_ins, platform
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student_step import accumulate_gradients, stage_loss
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import Rollout


@dataclass(frozen=True)
class GradientCost:
    """The cost of one gradient of the whole batch."""

    norm: float
    teacher_seconds: float
    student_seconds: float  # forward and backward
    target_bytes: int  # the most bytes of the teacher's states in memory on this rank
    peak_bytes: int  # the most memory in use, as `memory/peak_bytes` of a training step


def loss_of(objective: str, config: LossConfig) -> LossConfig:
    """Return the loss of one objective alone, as a mean over responses, with weight 1."""
    if objective == HIDDEN_STATES:
        changes = {"weight": 1.0, "aggregation": "sequence_mean"}
        return LossConfig(representation=config.representation.model_copy(update=changes))
    output = config.output.model_copy(
        update={"objective": objective, "weight": 1.0, "aggregation": "sequence_mean", "metrics_every": 0}
    )
    return LossConfig(representation=RepresentationConfig(weight=0.0), output=output)


def measure_gradients(run: Run, objective: str, rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Return variance and cost of the gradients of one objective, the same on every rank.

    Rollouts without a compared token are left out. Collective over the world.
    """
    loss = loss_of(objective, run.inputs.config.loss)
    useful = [rollout for rollout in rollouts if any(rollout.response_mask)]
    batch = gradient(run, loss, useful)
    single = [gradient(run, loss, [rollout]).norm for rollout in useful]
    by_prompt: dict[Any, list[Rollout]] = defaultdict(list)
    for rollout in useful:
        by_prompt[rollout.prompt_ids].append(rollout)
    found = variance(single, batch.norm)
    if len(by_prompt) < len(useful):
        found |= prompt_variance(
            single, {key: (len(group), gradient(run, loss, group).norm) for key, group in by_prompt.items()}
        )
    return {"objective": objective, **found, "cost": _cost(batch)}


def variance(norms: Sequence[float], norm_of_mean: float) -> dict[str, Any]:
    """Return the variance of N vectors from their norms and the norm of their mean.

    `variance` is the trace of the covariance, unbiased. `signal` is an unbiased estimate of the squared norm of the
    expected vector: the squared norm of the mean, less variance / N. `noise` is variance / signal: the number of
    rollouts in a batch whose gradient is as long as its error. It is None if the signal is not above zero.
    """
    number = len(norms)
    if number < 2:
        return {"rollouts": number, "variance": None, "signal": None, "noise": None}
    mean_square = sum(norm**2 for norm in norms) / number
    spread = max(mean_square - norm_of_mean**2, 0.0) * number / (number - 1)
    signal = norm_of_mean**2 - spread / number
    return {
        "rollouts": number,
        "mean_square": mean_square,
        "squared_norm_of_mean": norm_of_mean**2,
        "variance": spread,
        "signal": signal,
        "noise": spread / signal if signal > 0 else None,
    }


def prompt_variance(norms: Sequence[float], groups: Mapping[Any, tuple[int, float]]) -> dict[str, Any]:
    """Return the part of the variance that comes from sampling alone: among the rollouts of the same prompt.

    Args:
        norms: of the rollouts' gradients.
        groups: for each prompt the number of its rollouts and the norm of their mean gradient.
    """
    within = sum(norm**2 for norm in norms) - sum(number * norm**2 for number, norm in groups.values())
    degrees = len(norms) - len(groups)
    return {"prompts": len(groups), "variance_within_prompts": max(within, 0.0) / degrees}


def gradient(run: Run, loss: LossConfig, rollouts: Sequence[Rollout]) -> GradientCost:
    """Compute the gradient of the mean loss of some rollouts and return its norm and cost. No weight changes.

    Collective over the world.
    """
    (teacher,), config, topology = run.teachers, run.inputs.config, run.topology
    pairs = teacher.plan.pairs if loss.reads_layers else ()
    plan = dataclasses.replace(teacher.plan, pairs=pairs, output=loss.reads_output, flow=())
    student, teacher = dataclasses.replace(run.student, plan=plan), dataclasses.replace(teacher, plan=plan)
    setup = run.inputs.setup
    batch = GlobalBatch(
        tuple(rollouts), (0,) * len(rollouts), loss, config.batch, setup.student, setup.precision.pad_tokens
    )
    micro_batches = batch.micro_batches(topology)
    platform.reset_peak_memory(topology.device)
    targets, report = teacher_pass([teacher], batch, micro_batches, topology)
    output = None
    if plan.output and run.heads is not None:
        temperature = config.rollout.temperature
        output = OutputLoss(loss.output, run.heads, topology, temperature=temperature, with_metrics=False)
    taps = (stage_loss(student, loss, one, targets.of(number), output) for number, one in enumerate(micro_batches))
    begin = time.perf_counter()
    accumulate_gradients(student, micro_batches, taps)
    with cpu_stand_ins.cpu_devices():
        student.optimizer.prepare_grads()
        norm = float(student.optimizer.get_grad_norm())
    seconds = time.perf_counter() - begin - (report.seconds if report.streamed else 0.0)
    return GradientCost(norm, report.seconds, seconds, targets.most_bytes, platform.peak_memory_bytes(topology.device))


def _cost(batch: GradientCost) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(batch).items() if name != "norm"}
