"""Estimate of the time and the communication of one training step. docs/scaling.md has every formula.

The estimate is arithmetic over sizes and a data sheet, not a measurement. All functions are pure.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_oprd.config import ParallelConfig
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.planning.delta_net_costs import MOVED_BACKWARD, MOVED_FORWARD, moved_bytes
from megatron_oprd.planning.device_formulas import BYTES, linear_bytes, optimizer_state_bytes
from megatron_oprd.planning.flops import backward_flops, forward_flops, head_flops
from megatron_oprd.planning.hardware import H100, Cost, Hardware, Links
from megatron_oprd.planning.memory_formulas import most_selected_tokens, target_row_bytes
from megatron_oprd.planning.parameter_counts import rank_parameters
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_time import ROLLOUT, WEIGHT_SYNC, divide, rollout_costs
from megatron_oprd.planning.traffic import Traffic, backward_traffic, forward_traffic, update_traffic


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one step."""

    costs: tuple[Cost, ...]  # in the order in which the parts run
    teacher_bubble: float  # idle seconds per busy second of the teacher's pipeline
    student_bubble: float  # idle seconds per busy second of the student's pipeline
    world: int  # ranks
    hardware: Hardware
    with_servers: bool = False  # servers on other devices generate
    ahead: int = 0  # rollout.ahead

    @property
    def rollout_seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs if cost.name.startswith(ROLLOUT))

    @property
    def sync_seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs if cost.name == WEIGHT_SYNC)

    @property
    def training_seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs) - self.rollout_seconds - self.sync_seconds

    @property
    def seconds(self) -> float:
        return self.seconds_with(self.ahead)

    def seconds_with(self, ahead: int) -> float:
        """Return the seconds of a step with `rollout.ahead`: only servers generate while the student trains."""
        parts = self.rollout_seconds, self.training_seconds
        return self.sync_seconds + (max(parts) if ahead and self.with_servers else sum(parts))

    @property
    def utilisation(self) -> float:
        """Return the model FLOPs utilisation (MFU): operations without recomputation, divided by the bf16 peak.

        Operations of servers do not count.
        """
        others = ("student recompute", *((f"{ROLLOUT}prompts", f"{ROLLOUT}tokens") if self.with_servers else ()))
        useful = sum(cost.flops for cost in self.costs if cost.name not in others)
        return useful / (self.seconds * self.world * self.hardware.bf16_flops)


def estimate_step(run: PlannedRun, hardware: Hardware = H100) -> Estimate:
    """Return the cost of a step in which every rollout has the most tokens that it can have."""
    links = Links(hardware, run.setup.world_size)
    rollouts, teachers = run.rollouts_per_step, list(run.setup.teachers.values())
    teacher_rollouts = math.ceil(rollouts / len(teachers))
    teacher_costs = [_teacher_pass(run, teacher, teacher_rollouts, links) for teacher in teachers]
    costs = (
        *rollout_costs(run, links),
        *teacher_costs,
        links.cost("teacher rows", 0, 0, _target_traffic(run), run.config.parallel),
        *_student_passes(run, links),
        _update(run, links),
    )
    layout = teachers[-1].layout or run.config.parallel
    teacher_bubble = bubble(layout, _micro_batches(run, layout, teacher_rollouts))
    student_bubble = bubble(run.config.parallel, _micro_batches(run, run.config.parallel, rollouts))
    rollout = run.config.rollout
    return Estimate(
        costs,
        teacher_bubble,
        student_bubble,
        run.setup.world_size,
        hardware,
        with_servers=rollout.engine == "vllm",
        ahead=rollout.ahead,
    )


def bubble(layout: ParallelConfig, micro_batches: int) -> float:
    """Return the idle seconds of a pipeline per busy second (Narayanan et al., arXiv 2104.04473): (p - 1) / (v m).

    p: pipeline ranks, v: chunks of the model on each, m: micro-batches.
    """
    return (layout.pipeline - 1) / ((layout.virtual_pipeline or 1) * micro_batches)


def _micro_batches(run: PlannedRun, layout: ParallelConfig, rollouts: int) -> int:
    """Return the micro-batches of one replica of a model, filled with sequences of the most tokens."""
    batch, replicas = run.config.batch, run.setup.world_size // (layout.tensor * layout.pipeline * layout.context)
    sequences = max(batch.max_tokens_per_micro_batch // run.lengths.sequence, 1) if batch.packing else 1
    return math.ceil(math.ceil(rollouts / replicas) / sequences)


def _teacher_pass(run: PlannedRun, teacher: PlannedTeacher, rollouts: int, links: Links) -> Cost:
    config, layout, layers = run.config, teacher.layout or run.config.parallel, sum(teacher.plan.teacher_stages)
    sequences = [run.lengths.sequence] * rollouts
    replicas = run.setup.world_size // (layout.tensor * layout.pipeline * layout.context)
    flops = len(teacher.folders) * forward_flops(teacher.spec, layers, sequences)
    size = BYTES[config.precision.dtype]
    traffic = forward_traffic(teacher.spec, layout, layers, sum(sequences) / replicas, size)
    rate = links.hardware.flops_rate(teacher.spec, in_fp8=config.precision.first_teacher_fp8 != "off")
    idle = bubble(layout, _micro_batches(run, layout, rollouts))
    moved = len(teacher.folders) * moved_bytes(teacher.spec, layers, sum(sequences) * layout.context, MOVED_FORWARD)
    seconds = (flops / rate + moved / links.hardware.memory_rate()) / run.setup.world_size * (1 + idle)
    return links.cost("teacher pass", flops, seconds, traffic, layout)


def _target_traffic(run: PlannedRun) -> Traffic:
    """Return the teachers' states that an average rank sends.

    Every selected token of every compared layer goes to each rank that needs it. No such rank has it already.
    """
    parallel, plan, teachers = run.config.parallel, run.setup.layer_plan, list(run.setup.teachers.values())
    if len(teachers) == 1 and plan.aligned:
        return Traffic()
    rows = run.rollouts_per_step * min(most_selected_tokens(run.config.loss), run.lengths.response)
    row_bytes = target_row_bytes(run, max(teacher.spec.hidden_size for teacher in teachers))
    layers = len({pair.teacher for pair in plan.pairs}) + plan.output
    copies = 1 if parallel.sequence else parallel.tensor  # ranks that need the same row
    return Traffic(targets=rows * layers * row_bytes * copies / run.setup.world_size)


def _student_passes(run: PlannedRun, links: Links) -> list[Cost]:
    """Return the costs of the student's forward pass, recomputation and backward pass."""
    config, student, plan = run.config, run.setup.student, run.setup.layer_plan
    parallel, size, layers = config.parallel, BYTES[config.precision.dtype], plan.student_last_layer
    sequences = [run.lengths.sequence] * run.rollouts_per_step
    tokens = sum(sequences)
    replicas = run.setup.world_size // (parallel.tensor * parallel.pipeline * parallel.context)
    idle = bubble(parallel, _micro_batches(run, parallel, run.rollouts_per_step))
    rate = links.hardware.flops_rate(student, in_fp8=config.precision.fp8 is not None)

    def seconds(flops: float, moved_per_stored_byte: float) -> float:
        moved = moved_bytes(student, layers, tokens * parallel.context, moved_per_stored_byte)
        return (flops / rate + moved / links.hardware.memory_rate()) / run.setup.world_size * (1 + idle)

    forward = forward_flops(student, layers, sequences)
    sent = forward_traffic(student, parallel, layers, tokens / replicas, size)
    # The loss computes the gradients of the student's head at once. The teachers' heads have a forward pass only.
    own_head = head_flops(student, tokens)
    teacher_heads = sum(head_flops(one.spec, tokens) for one in run.setup.teachers.values())
    passes = 2 if config.loss.output.importance else 1  # importance needs all log-probabilities before the gradients
    heads = 2 * own_head + passes * (own_head + teacher_heads)
    flops = forward + (heads if plan.output else 0)
    costs = [links.cost("student forward", flops, seconds(flops, MOVED_FORWARD), sent, parallel)]
    if config.recompute.granularity == "full":
        sent_again = dataclasses.replace(sent, pipeline=0.0)
        costs.append(links.cost("student recompute", forward, seconds(forward, MOVED_FORWARD), sent_again, parallel))
    flops = backward_flops(student, layers, sequences)
    sent = backward_traffic(student, parallel, layers, tokens / replicas, size)
    return [*costs, links.cost("student backward", flops, seconds(flops, MOVED_BACKWARD), sent, parallel)]


def _update(run: PlannedRun, links: Links) -> Cost:
    """Return the cost of reducing gradients, reading and writing the optimizer state, and gathering parameters."""
    config, parallel = run.config, run.config.parallel
    lm_head = run.setup.student.tied_embeddings or run.setup.layer_plan.output
    dense, experts = rank_parameters(run.setup.student, divide(run.setup.student, parallel), 0, lm_head=lm_head)
    traffic = update_traffic(parallel, (dense, experts), run.setup.world_size, BYTES[config.precision.dtype])
    copies = run.setup.world_size // (parallel.tensor * parallel.pipeline) if parallel.distributed_optimizer else 1
    bytes_per_parameter = optimizer_state_bytes(config) + 4 + linear_bytes(config, teacher=False)
    seconds = 2 * ((dense + experts) / copies * bytes_per_parameter) / links.hardware.memory_rate()
    overlaps = parallel.overlap_grad_reduce and parallel.overlap_param_gather
    return links.cost("update", 0, seconds, traffic, parallel, overlaps)
