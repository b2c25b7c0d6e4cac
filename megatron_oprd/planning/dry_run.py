"""Print what a configuration would run, without running it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_oprd.config import dump_config, teacher_title
from megatron_oprd.hf.names import count_parameters
from megatron_oprd.launch.missing_inputs import MissingInputs
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.planning.memory_formulas import predict_memory
from megatron_oprd.planning.peak_memory import NotTraced, predict_peaks
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_memory import CachePlan, plan_cache
from megatron_oprd.planning.rollout_report import rollout_lines
from megatron_oprd.planning.step_time import Estimate, estimate_step
from megatron_oprd.planning.update_trace import Footprint

NOTHING = MissingInputs()
COLUMNS = ("weights", "gradients", "optimizer", "teacher", "targets", "activations")  # the fields of a Footprint


def describe_run(run: PlannedRun, missing: MissingInputs = NOTHING) -> None:
    """Print the configuration, the models, the compared layers, and the predicted memory and time of a step.

    Lines about `missing` inputs say what was not checked. Of several processes, only rank 0 prints. No communication.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    console = Console()
    console.print(dump_config(run.config), markup=False, highlight=False)
    for line in missing.lines(run.config):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"student: {run.setup.student.architecture}, {count_parameters(run.setup.student):,} parameters")
    for name, teacher in run.setup.teachers.items():
        _print_teacher(console, name, teacher)
    try:
        peaks = predict_peaks(run)
        _print_peaks(console, peaks, run.setup.world_size)
        models = max(footprint.weights + footprint.teacher_weights for footprint in peaks.values())
        kept = max(footprint.peak - footprint.targets - footprint.activations for footprint in peaks.values())
    except NotTraced as reason:
        parts = predict_memory(run)
        _print_formulas(console, parts, run.setup.world_size, str(reason))
        models = parts["student weights"] + parts["teacher weights"]
        kept = models + parts["student gradients"] + parts["optimizer state"]
    _print_cache(console, plan_cache(run, models), kept)
    _print_step(console, estimate_step(run))
    for line in rollout_lines(run):
        console.print(line, markup=False, highlight=False)


def _print_step(console: Console, estimate: Estimate) -> None:
    """Print a row for each part of a step, and the assumptions."""
    hardware = estimate.hardware
    title = f"A step on {estimate.world} x {hardware.name} (estimated, not measured)"
    columns = ("part", "PFLOP", "NVLink GB", "network GB", "seconds")
    table = Table(*columns, title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    rows = [(c.name, c.flops, c.nvlink, c.network, c.seconds) for c in estimate.costs]
    for name, flops, nvlink, network, seconds in [*rows, ("sum", *map(sum, list(zip(*rows, strict=True))[1:]))]:
        table.add_row(name, f"{flops / 1e15:,.1f}", f"{nvlink / 1e9:.2f}", f"{network / 1e9:.2f}", f"{seconds:.1f}")
    console.print(table)
    console.print(
        "PFLOP: operations of all ranks. GB: bytes that one rank sends. Every rollout has the most tokens. Assumed: "
        f"{hardware.matrix_share:.0%} of {hardware.bf16_flops / 1e12:.0f} TFLOP/s in bf16, "
        f"{hardware.fp8_share:.0%} of {hardware.fp8_flops / 1e12:.0f} TFLOP/s in FP8, "
        f"{hardware.expert_share:.0%} with experts; {hardware.memory_share:.0%} of {hardware.memory_bytes / 1e12:.2f} "
        f"TB/s of memory bandwidth, {hardware.link_share:.0%} of {hardware.nvlink_bytes / 1e9:.0f} GB/s NVLink and of "
        f"{hardware.network_bytes / 1e9:.0f} GB/s network. Pipeline bubble: student {estimate.student_bubble:.0%}, "
        f"teacher {estimate.teacher_bubble:.0%}. Resulting MFU: {estimate.utilisation:.1%}. docs/scaling.md has the "
        "formulas.",
        markup=False,
        highlight=False,
    )


def _print_peaks(console: Console, peaks: Mapping[range, Footprint], world: int) -> None:
    """Print the parts of the peak: a row for each group of ranks with the same stages."""
    title = f"Memory, {world} processes: peak of an update, GiB (predicted)"
    table = Table("ranks", *COLUMNS, "peak", title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for ranks, footprint in peaks.items():
        parts = [*dataclasses.astuple(footprint), footprint.peak]
        name = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(ranks[0])
        table.add_row(name, *map(_gib, parts))
    console.print(table)
    largest = max(footprint.peak for footprint in peaks.values())
    left = 80 - largest / 1e9
    console.print(f"fullest rank: {largest / 1e9:.2f} GB; of 80 GB that leaves {left:.2f} GB", highlight=False)
    console.print(
        "Traced on the fullest micro-batch, with balanced experts. teacher: weights. targets: hidden states of the "
        "teacher. activations: also the loss and all temporary tensors. Not included: CUDA context, communication "
        "buffers, and the KV cache, which exists only while rollouts are generated."
    )


def _print_cache(console: Console, cache: CachePlan | None, kept: int) -> None:
    """Print the KV cache of the rollouts. `kept`: bytes of the fullest rank that an update leaves in memory."""
    if cache is None:
        return
    turns = "" if cache.rows == cache.rollouts else f" (of {cache.rollouts} rollouts, which take turns)"
    console.print(
        f"KV cache: {cache.rows} rows{turns} of {cache.length:,} tokens, {cache.num_bytes / 1e9:.2f} GB on the fullest "
        f"rank; with weights, gradients, optimizer and teacher {(kept + cache.num_bytes) / 1e9:.2f} GB",
        highlight=False,
    )


def _print_formulas(console: Console, parts: Mapping[str, int], world: int, reason: str) -> None:
    table = Table("on the fullest rank", "GiB (estimated)", title=f"Memory, {world} processes")
    for purpose, size in {**parts, "sum": sum(parts.values())}.items():
        table.add_row(purpose, _gib(size))
    console.print(table)
    console.print(f"by formula, because the update could not be traced: {reason}", markup=False)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3f}"


def _print_teacher(console: Console, name: str, teacher: PlannedTeacher) -> None:
    plan, spec = teacher.plan, teacher.spec
    title = teacher_title(name)
    if plan.pairs:
        pairs = Table("student layer", "teacher layer", "pipeline stage", title=f"Compared layers, {title}")
        for pair in plan.pairs:
            normed = " (after the final norm)" if pair.student == plan.student_normed_layer else ""
            pairs.add_row(f"{pair.student}{normed}", str(pair.teacher), _place(plan, pair.student))
        console.print(pairs)
    head = "with its LM head on the student's last stage" if plan.output else "without LM head"
    console.print(
        f"{title}: {spec.architecture}, {count_parameters(spec):,} parameters, built up to layer "
        f"{sum(plan.teacher_stages)} of {plan.teacher_depth} and {head}"
    )
    console.print(
        f"{title}: its hidden states are computed on the ranks that compare them"
        if plan.aligned
        else f"{title}: its hidden states are sent from its layout to the student's"
    )


def _place(plan: LayerPlan, layer: int) -> str:
    chunk, rank = plan.student_place(layer)
    return f"{rank}, chunk {chunk}" if len(plan.student_stages) > plan.pipeline_size else str(rank)
