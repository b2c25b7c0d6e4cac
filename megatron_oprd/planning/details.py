"""The long part of a plan: the complete configuration, each pair of layers, and the cost of each part of a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_oprd.config import dump_config, teacher_title
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.step_time import Estimate


def detail_lines(run: PlannedRun, estimate: Estimate | None) -> Iterator[str]:
    """Yield the lines. `estimate`: the costs of a step; None: they are unknown and left out."""
    yield "configuration"
    yield dump_config(run.config)
    for name, teacher in run.setup.teachers.items():
        if teacher.plan.pairs:
            yield f"compared layers, {teacher_title(name)}"
            yield from _pairs(teacher.plan)
            yield ""
    if estimate is not None:
        yield from _costs(estimate)


def _pairs(plan: LayerPlan) -> Iterator[str]:
    rows = [("student layer", "teacher layer", "pipeline stage")]
    for pair in plan.pairs:
        normed = " (after the final norm)" if pair.student == plan.student_normed_layer else ""
        rows.append((f"{pair.student}{normed}", str(pair.teacher), _place(plan, pair.student)))
    yield from _aligned(rows)


def _place(plan: LayerPlan, layer: int) -> str:
    chunk, rank = plan.student_place(layer)
    return f"{rank}, chunk {chunk}" if len(plan.student_stages) > plan.pipeline_size else str(rank)


def _costs(estimate: Estimate) -> Iterator[str]:
    """Yield a row for each part of a step, and the assumptions."""
    hardware = estimate.hardware
    yield f"a step on {estimate.world} x {hardware.name} (estimated, not measured)"
    rows = [("part", "PFLOP", "NVLink GB", "network GB", "seconds")]
    costs = [(c.name, c.flops, c.nvlink, c.network, c.seconds) for c in estimate.costs]
    for name, flops, nvlink, network, seconds in [*costs, ("sum", *map(sum, list(zip(*costs, strict=True))[1:]))]:
        rows.append((name, f"{flops / 1e15:,.1f}", f"{nvlink / 1e9:.2f}", f"{network / 1e9:.2f}", f"{seconds:.1f}"))
    yield from _aligned(rows)
    yield (
        "PFLOP: operations of all ranks. GB: bytes that one rank sends. Every rollout has the most tokens. Assumed: "
        f"{hardware.matrix_share:.0%} of {hardware.bf16_flops / 1e12:,.3g} TFLOP/s, "
        f"{hardware.fp8_share:.0%} of {hardware.fp8_flops / 1e12:,.3g} TFLOP/s in FP8, "
        f"{hardware.expert_share:.0%} with experts; {hardware.memory_share:.0%} of {hardware.memory_bytes / 1e12:.2g} "
        f"TB/s of memory bandwidth, {hardware.link_share:.0%} of {hardware.nvlink_bytes / 1e9:.3g} GB/s NVLink and of "
        f"{hardware.network_bytes / 1e9:.3g} GB/s network. Pipeline bubble: student {estimate.student_bubble:.0%}, "
        f"teacher {estimate.teacher_bubble:.0%}. Resulting MFU: {estimate.utilisation:.1%}."
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
