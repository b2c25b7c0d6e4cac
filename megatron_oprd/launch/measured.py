"""Give the models of a run to the measurement of stored answers."""

from __future__ import annotations

from functools import partial

from megatron_oprd.evaluation.measure import MeasuredModels, has_teacher_distribution
from megatron_oprd.launch.assemble import Run
from megatron_oprd.launch.models import load_heads


def measured_models(run: Run, *, layers: bool) -> MeasuredModels:
    """Return the student, and the teacher where both read the same token ids.

    `layers`: compare the hidden states of the compared layers too, otherwise next-token distributions alone.
    """
    inputs, setup, stage = run.inputs, run.inputs.setup, run.student.stage
    output = setup.layer_plan.output
    # The LM head of a teacher that follows the student is averaged only if the loss needs it.
    has_head = output or run.student.average is None
    with_output = has_head and has_teacher_distribution(run.teachers) and inputs.aligner is None
    heads = None
    if with_output:
        heads = (lambda: run.heads) if output else partial(load_heads, inputs.model_inputs, stage, run.topology)
    compared = inputs.config.loss.representation if layers and inputs.config.loss.reads_layers else None
    return MeasuredModels(
        stage,
        setup.student,
        run.topology,
        inputs.config.batch,
        setup.precision.pad_tokens,
        run.teachers[0] if with_output or compared is not None else None,
        heads,
        compared,
        run.student.maps,
    )
