"""The metrics of a training step: loss, gradient norm, lengths, times and memory. `train.one_step` makes one meter."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from megatron_oprd.models.targets import TeacherTargets
from megatron_oprd.runtime import platform, progress
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.teacher_pass import PassReport
from megatron_oprd.types import StepReport


class StepMeter:
    """Measures the seconds and the peak memory of one step, from its construction on."""

    def __init__(self, device: torch.device) -> None:
        self._stopwatch = progress.Stopwatch()
        self._device = device
        platform.reset_peak_memory(device)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Enter the stage `name` of the step and measure `time/<name>`."""
        return self._stopwatch(name)

    def metrics(
        self, step: int, report: StepReport, global_batch: GlobalBatch, targets: TeacherTargets, teacher: PassReport
    ) -> dict[str, float]:
        """Return all metrics of a step, under the names of `metrics.jsonl`. No communication.

        `time/teacher` is the time of the teacher pass. If the teacher was streamed, it ran during the student's step
        and its time is not part of `time/student`.
        """
        values = {"step": step, "loss": report.loss, "grad_norm": report.grad_norm, "lr": report.learning_rate}
        values |= report.metrics | global_batch.metrics()
        values |= {"teacher/moved_bytes": teacher.moved_bytes, "teacher/target_bytes": targets.most_bytes}
        seconds = self._stopwatch.seconds()
        if teacher.streamed:
            seconds["time/student"] -= teacher.seconds
        values |= seconds | {"time/teacher": teacher.seconds}
        return values | {"memory/peak_bytes": platform.peak_memory_bytes(self._device)}
