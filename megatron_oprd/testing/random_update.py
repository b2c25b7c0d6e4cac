"""Build a student and a teacher of any shape with random weights, and run updates on given rollouts, without files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_oprd.config import Config
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import DTYPES, ModelPart, build_model
from megatron_oprd.models.model import Stage
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.models.precision import Precision
from megatron_oprd.parallel.topology import Topology, build_topology, start_process
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student import Student, build_student
from megatron_oprd.training.student_step import student_step
from megatron_oprd.training.teacher import Teacher, build_frozen
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import DeviceBatch, Rollout, StepReport

STANDARD_DEVIATION = 0.02  # of the random weights


@dataclass(frozen=True)
class RandomUpdate:
    """The models and the batch of an update."""

    config: Config
    topology: Topology
    stage: Stage  # the student's modules
    student: Student
    teacher: Teacher
    heads: Heads | None  # None without an objective on next-token distributions
    global_batch: GlobalBatch
    micro_batches: list[DeviceBatch]

    def run(self) -> StepReport:
        """Run the teacher pass and the student's step. Collective over the world."""
        targets, _ = teacher_pass([self.teacher], self.global_batch, self.micro_batches, self.topology)
        output = None
        if self.heads is not None:
            output = OutputLoss(self.config.loss.output, self.heads, self.topology, temperature=1.0, with_metrics=False)
        return student_step(self.student, self.global_batch, self.micro_batches, targets, output)


def build_random_update(
    config: Config,
    spec: ModelSpec,
    rollouts: Sequence[Rollout],
    device: torch.device,
    precision: Precision | None = None,
) -> RandomUpdate:
    """Build an update of a student and a teacher of the same shape.

    Args:
        config: one teacher without a layout of its own.
        spec: the shape of both models.
        rollouts: those of all ranks.
        device: of this process. Without a process group, one of a single process is started.
        precision: the modules of both models; None: those of this package, without FP8.
    """
    start_process(device)
    topology = build_topology(config.parallel, device, seed=0)
    planned = plan_teacher(config, spec, spec)
    plan, dtype = planned.plan, DTYPES[config.precision.dtype]
    precision = precision or Precision()
    part = ModelPart(plan.student_stages)
    stage = build_model(spec, topology, dtype, part, recompute=config.recompute, precision=precision.student)
    frozen = build_frozen(planned, topology, dtype, precision.teacher)
    fill_randomly(stage, frozen)
    frozen.eval().requires_grad_(False)
    heads = None
    if plan.output:
        head = stage[-1].lm_head
        heads = Heads(head, (torch.randn_like(head).mul_(STANDARD_DEVIATION),), 0)
    teachers = (0,) * len(rollouts)
    global_batch = GlobalBatch(tuple(rollouts), teachers, config.loss, config.batch, spec, precision.pad_tokens)
    return RandomUpdate(
        config,
        topology,
        stage,
        build_student(stage, config, plan, topology),
        Teacher(lambda: frozen, topology, plan, spec.hidden_size),
        heads,
        global_batch,
        global_batch.micro_batches(topology),
    )


@torch.no_grad()
def fill_randomly(*models: torch.nn.Module) -> None:
    """Fill models that were built without weights: matrices from a normal distribution, vectors with ones."""
    torch.manual_seed(0)
    for parameter in (parameter for model in models for parameter in model.parameters()):
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        # FP8 parameters accept values only by `copy_`.
        parameter.copy_(values.normal_(std=STANDARD_DEVIATION) if parameter.ndim > 1 else values.fill_(1))
