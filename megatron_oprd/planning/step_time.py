"""Estimate of the time and the communication of one training step. docs/scaling.md has every formula.

The estimate is arithmetic over sizes and a data sheet, not a measurement. All functions are pure.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_oprd.config import Config, ParallelConfig
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.models.layer_plan import PlannedTeacher, even_stages
from megatron_oprd.planning.device_formulas import BYTES, linear_bytes, optimizer_state_bytes
from megatron_oprd.planning.flops import backward_flops, forward_flops, head_flops
from megatron_oprd.planning.hardware import H100, Cost, Hardware, Links
from megatron_oprd.planning.memory_formulas import most_selected_tokens, target_row_bytes
from megatron_oprd.planning.parameter_counts import ModelDivision, rank_parameters
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.traffic import Traffic, backward_traffic, forward_traffic, update_traffic
from megatron_oprd.types import ModelSpec


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of one step."""

    costs: tuple[Cost, ...]  # in the order in which the parts run
    teacher_bubble: float  # idle seconds per busy second of the teacher's pipeline
    student_bubble: float  # idle seconds per busy second of the student's pipeline
    world: int  # ranks
    hardware: Hardware

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)

    @property
    def utilisation(self) -> float:
        """Return the model FLOPs utilisation (MFU): operations without recomputation, divided by the bf16 peak."""
        useful = sum(cost.flops for cost in self.costs if cost.name != "student recompute")
        return useful / (self.seconds * self.world * self.hardware.bf16_flops)


def estimate_step(run: PlannedRun, hardware: Hardware = H100) -> Estimate:
    """Return the cost of a step in which every rollout has the most tokens that it can have."""
    links = Links(hardware, run.setup.world_size)
    rollouts, teachers = run.rollouts_per_step, list(run.setup.teachers.values())
    teacher_rollouts = math.ceil(rollouts / len(teachers))
    teacher_costs = [_teacher_pass(run, teacher, teacher_rollouts, links) for teacher in teachers]
    costs = (
        *_rollout(run, links),
        *teacher_costs,
        links.cost("teacher rows", 0, 0, _target_traffic(run), run.config.parallel),
        *_student_passes(run, links),
        _update(run, links),
    )
    layout = teachers[-1].layout or run.config.parallel
    teacher_bubble = bubble(layout, _micro_batches(run, layout, teacher_rollouts))
    student_bubble = bubble(run.config.parallel, _micro_batches(run, run.config.parallel, rollouts))
    return Estimate(costs, teacher_bubble, student_bubble, run.setup.world_size, hardware)


def bubble(layout: ParallelConfig, micro_batches: int) -> float:
    """Return the idle seconds of a pipeline per busy second (Narayanan et al., arXiv 2104.04473): (p - 1) / (v m).

    p: pipeline ranks, v: chunks of the model on each, m: micro-batches.
    """
    return (layout.pipeline - 1) / ((layout.virtual_pipeline or 1) * micro_batches)


def decode_seconds(config: Config, spec: ModelSpec, rows: int, lengths: Lengths, hardware: Hardware) -> float:
    """Return the seconds in which a replica generates one token for each of `rows` sequences.

    This is the time to read the weights and the KV cache, or to launch the kernels if that takes longer. The average
    cache has the longest prompt and half of the longest response. Pipeline stages work one after the other.
    """
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    dense, experts = rank_parameters(spec, _division(config, spec), 0, lm_head=True)
    used_experts = 0.0  # share of the experts that at least one row is sent to
    if spec.num_experts:
        used_experts = 1 - (1 - spec.experts_per_token / spec.num_experts) ** (rows * parallel.expert)
    cached_tokens = lengths.sequence - lengths.response / 2
    groups = spec.num_query_groups / parallel.tensor
    keys_and_values = 2 * spec.num_layers / parallel.pipeline * groups * spec.head_dim * size * cached_tokens
    bytes_read = (dense + experts * used_experts) * size + rows * keys_and_values
    seconds = bytes_read / hardware.memory_rate()
    return parallel.pipeline * max(seconds, hardware.layer_seconds * spec.num_layers / parallel.pipeline)


def _micro_batches(run: PlannedRun, layout: ParallelConfig, rollouts: int) -> int:
    """Return the micro-batches of one replica of a model, filled with sequences of the most tokens."""
    batch, replicas = run.config.batch, run.setup.world_size // (layout.tensor * layout.pipeline * layout.context)
    sequences = max(batch.max_tokens_per_micro_batch // run.lengths.sequence, 1) if batch.packing else 1
    return math.ceil(math.ceil(rollouts / replicas) / sequences)


def _division(config: Config, spec: ModelSpec) -> ModelDivision:
    parallel = config.parallel
    stages = even_stages(spec.num_layers, parallel.pipeline, parallel.virtual_pipeline or 1)
    return ModelDivision(parallel.tensor, parallel.pipeline, parallel.expert, stages)


def _rollout(run: PlannedRun, links: Links) -> list[Cost]:
    """Return the costs of prefill and of decoding. Each data- and context-parallel rank generates its own rollouts."""
    config, spec, lengths = run.config, run.setup.student, run.lengths
    parallel, size, rollouts = config.parallel, BYTES[config.precision.dtype], run.rollouts_per_step
    if config.rollout.engine != "megatron":
        return []
    replicas = run.setup.world_size // (parallel.tensor * parallel.pipeline)
    rows, prompt = math.ceil(rollouts / replicas), lengths.sequence - lengths.response
    layout = parallel.model_copy(update={"context": 1, "sequence": False})  # in which the engine runs the model
    prefill_flops = forward_flops(spec, spec.num_layers, [prompt] * rollouts)
    prefill_seconds = prefill_flops / (run.setup.world_size * links.hardware.flops_rate(spec, in_fp8=False))
    prefill_traffic = forward_traffic(spec, layout, spec.num_layers, rows * prompt, size)
    decode_flops = forward_flops(spec, spec.num_layers, [lengths.sequence] * rollouts) - prefill_flops
    decode_flops += head_flops(spec, rollouts * lengths.response)
    seconds = lengths.response * decode_seconds(config, spec, rows, lengths, links.hardware)
    decode_traffic = forward_traffic(spec, layout, spec.num_layers, rows * lengths.response, size)
    return [
        links.cost("rollout: prompts", prefill_flops, prefill_seconds * parallel.pipeline, prefill_traffic, layout),
        links.cost("rollout: tokens", decode_flops, seconds, decode_traffic, layout),
    ]


def _teacher_pass(run: PlannedRun, teacher: PlannedTeacher, rollouts: int, links: Links) -> Cost:
    config, layout, layers = run.config, teacher.layout or run.config.parallel, sum(teacher.plan.teacher_stages)
    sequences = [run.lengths.sequence] * rollouts
    replicas = run.setup.world_size // (layout.tensor * layout.pipeline * layout.context)
    flops = forward_flops(teacher.spec, layers, sequences)
    size = BYTES[config.precision.dtype]
    traffic = forward_traffic(teacher.spec, layout, layers, sum(sequences) / replicas, size)
    rate = links.hardware.flops_rate(teacher.spec, in_fp8=config.precision.teacher_fp8 != "off")
    idle = bubble(layout, _micro_batches(run, layout, rollouts))
    return links.cost("teacher pass", flops, flops / (run.setup.world_size * rate) * (1 + idle), traffic, layout)


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
    rate = links.hardware.flops_rate(student, in_fp8=config.precision.fp8 is not None) / (1 + idle)

    forward = forward_flops(student, layers, sequences)
    sent = forward_traffic(student, parallel, layers, tokens / replicas, size)
    # The loss computes the gradients of the student's head at once. The teachers' heads have a forward pass only.
    heads = 3 * head_flops(student, tokens) + sum(head_flops(one.spec, tokens) for one in run.setup.teachers.values())
    flops = forward + (heads if plan.output else 0)
    costs = [links.cost("student forward", flops, flops / (run.setup.world_size * rate), sent, parallel)]
    if config.recompute.granularity == "full":
        sent_again, seconds = dataclasses.replace(sent, pipeline=0.0), forward / (run.setup.world_size * rate)
        costs.append(links.cost("student recompute", forward, seconds, sent_again, parallel))
    flops = backward_flops(student, layers, sequences)
    sent = backward_traffic(student, parallel, layers, tokens / replicas, size)
    return [*costs, links.cost("student backward", flops, flops / (run.setup.world_size * rate), sent, parallel)]


def _update(run: PlannedRun, links: Links) -> Cost:
    """Return the cost of reducing gradients, reading and writing the optimizer state, and gathering parameters."""
    config, parallel = run.config, run.config.parallel
    lm_head = run.setup.student.tied_embeddings or run.setup.layer_plan.output
    dense, experts = rank_parameters(run.setup.student, _division(config, run.setup.student), 0, lm_head=lm_head)
    traffic = update_traffic(parallel, (dense, experts), run.setup.world_size, BYTES[config.precision.dtype])
    copies = run.setup.world_size // (parallel.tensor * parallel.pipeline) if parallel.distributed_optimizer else 1
    bytes_per_parameter = optimizer_state_bytes(config) + 4 + linear_bytes(config, teacher=False)
    seconds = 2 * ((dense + experts) / copies * bytes_per_parameter) / links.hardware.memory_rate()
    overlaps = parallel.overlap_grad_reduce and parallel.overlap_param_gather
    return links.cost("update", 0, seconds, traffic, parallel, overlaps)
