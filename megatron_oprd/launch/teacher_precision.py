"""`precision.teacher_fp8: auto`: the teachers' weights go to FP8 after step 1 if that changes their states little."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial

from megatron_oprd.launch.assemble import Run
from megatron_oprd.launch.step_data import make_global_batch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.precision import ModelPrecision
from megatron_oprd.parallel.rank_zero import on_rank_zero
from megatron_oprd.runtime import progress
from megatron_oprd.training.fp8_error import measure_error
from megatron_oprd.training.state import TrainState
from megatron_oprd.training.teacher import Teacher, switch_precision
from megatron_oprd.types import Rollout

MEASURED_ROLLOUTS = 2  # of each replica


def choose_teacher_precision(
    run: Run, state: TrainState, metrics: Mapping[str, float], rollouts: Sequence[Rollout]
) -> TrainState:
    """Measure the error of FP8 after the first step, switch the teachers if it is small, and return the choice.

    In other steps, and if the run cannot have FP8 weights, return the state unchanged. Only one precision of the
    teachers is in memory at a time.

    Args:
        run: The run.
        state: The state after the step.
        metrics: Its metrics; `rep/mse` is the loss that the error is compared with.
        rollouts: Its rollouts, of which the error is measured on the first few.

    Collective over the world in the first step.
    """
    precision, loss = run.inputs.setup.precision, metrics.get("rep/mse", 0.0)
    if precision.fp8_candidate is None or state.step != 1 or loss <= 0:
        return state
    few = rollouts[: MEASURED_ROLLOUTS * run.topology.num_replicas]
    in_fp8 = [
        dataclasses.replace(teacher, load=partial(_switched, teacher, precision.fp8_candidate))
        for teacher in run.teachers
    ]
    with progress.stage("teacher"):
        errors = measure_error(run.teachers, in_fp8, make_global_batch(run.inputs, few, 0), run.topology)
    floor, most = sum(error.floor for error in errors.values()), run.inputs.config.precision.teacher_fp8_share

    def choose() -> bool:
        chosen = floor <= most * loss
        weights = "FP8 weights from step 2 on" if chosen else "the teacher stays as it is"
        print(
            f"precision.teacher_fp8=auto: the error of FP8 weights is {floor:.3g}, {floor / loss:.2%} of the first "
            f"rep/mse; allowed {most:.2%}: {weights}",
            flush=True,
        )
        return chosen

    chosen = on_rank_zero(choose)
    if not chosen:
        _switch(run.teachers, precision.teacher)
    return dataclasses.replace(state, teacher_in_fp8=chosen)


def restore_teacher_precision(run: Run, state: TrainState) -> None:
    """Switch the teachers to FP8 if the run that continues had chosen it. No communication."""
    precision = run.inputs.setup.precision
    if not state.teacher_in_fp8 or run.inputs.config.precision.teacher_fp8 != "auto":
        return
    if precision.fp8_candidate is not None:
        _switch(run.teachers, precision.fp8_candidate)
    elif run.topology.rank == 0:
        print(
            "precision.teacher_fp8=auto: the run had FP8 weights of the teacher, which it cannot have here", flush=True
        )


def _switch(teachers: Sequence[Teacher], precision: ModelPrecision) -> None:
    for teacher in teachers:
        switch_precision(teacher, precision)


def _switched(teacher: Teacher, precision: ModelPrecision) -> Stage:
    switch_precision(teacher, precision)
    return teacher.load()
