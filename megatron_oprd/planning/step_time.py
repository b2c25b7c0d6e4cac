"""How long a step may take and what it sends, estimated from sizes and a machine's data sheet. Pure; docs/scaling.md
has every formula. Nothing here is a measurement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.config import Config, ParallelConfig
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.models.layer_plan import PlannedTeacher, even_stages
from megatron_oprd.planning.device_formulas import BYTES, linear_bytes, state_bytes
from megatron_oprd.planning.flops import backward_flops, forward_flops, head_flops
from megatron_oprd.planning.memory_formulas import Share, most_selected, rank_parameters
from megatron_oprd.planning.traffic import Traffic, backward_traffic, forward_traffic, reach, update_traffic
from megatron_oprd.types import ModelSpec


@dataclass(frozen=True)
class Hardware:
    """One GPU by its data sheet, per second, and the share of it that is assumed to be reached."""

    name: str = "H100 SXM"
    gpus_per_node: int = 8
    bf16_flops: float = 989e12
    fp8_flops: float = 1979e12
    memory_bytes: float = 3.35e12
    nvlink_bytes: float = 450e9  # one direction
    network_bytes: float = 50e9  # 400 Gb/s for each GPU
    matrix_share: float = 0.45  # of bf16_flops, all kernels of a pass counted
    fp8_share: float = 0.35  # of fp8_flops
    expert_share: float = 0.30  # of either where blocks have experts
    memory_share: float = 0.7
    link_share: float = 0.7
    block_seconds: float = 1e-4  # to launch the kernels of a block while generating


H100 = Hardware()


@dataclass(frozen=True)
class Cost:
    """What a part of a step takes: operations over all ranks, bytes that a rank sends, seconds."""

    name: str
    flops: float
    nvlink: float
    network: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    costs: tuple[Cost, ...]
    teacher_bubble: float  # idle seconds for each busy one
    student_bubble: float
    world: int
    hardware: Hardware

    @property
    def seconds(self) -> float:
        return sum(cost.seconds for cost in self.costs)

    @property
    def utilisation(self) -> float:
        """Operations a second, recomputation left out, of what all devices can do in bf16 (MFU)."""
        useful = sum(cost.flops for cost in self.costs if cost.name != "student recompute")
        return useful / (self.seconds * self.world * self.hardware.bf16_flops)


def estimate_step(
    config: Config,
    student: ModelSpec,
    planned: Sequence[PlannedTeacher],
    lengths: Lengths,
    *,
    world: int,
    bridge_rank: int | None = None,
    hardware: Hardware = H100,
) -> Estimate:
    """The parts of a step in which every rollout has the most tokens that it can have."""
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    sequences = [lengths.sequence] * rollouts
    plan, blocks = planned[0].plan, planned[0].plan.student_last_layer
    wire = _Wire(hardware, world)
    costs = _rollout(config, student, lengths, wire)

    bubble_of_teacher = 0.0
    for teacher in planned:
        layout, built = teacher.layout or parallel, sum(teacher.plan.teacher_stages)
        taught = sequences[: math.ceil(rollouts / len(planned))]
        replicas = world // (layout.tensor * layout.pipeline * layout.context)
        bubble_of_teacher = bubble(layout, _micro_batches(config, len(taught), lengths, replicas))
        flops = forward_flops(teacher.spec, built, taught)
        traffic = forward_traffic(teacher.spec, layout, built, sum(taught) / replicas, size)
        rate = _rate(hardware, teacher.spec, in_fp8=config.precision.teacher_fp8 != "off")
        seconds = flops / (world * rate) * (1 + bubble_of_teacher)
        costs.append(wire.cost("teacher pass", flops, seconds, traffic, layout))
    costs.append(wire.cost("teacher rows", 0, 0, _rows(config, planned, lengths, bridge_rank, world), parallel))

    replicas = world // (parallel.tensor * parallel.pipeline * parallel.context)
    idle = bubble(parallel, _micro_batches(config, rollouts, lengths, replicas))
    rate = _rate(hardware, student, in_fp8=config.precision.fp8 is not None) / (1 + idle)
    forward = forward_flops(student, blocks, sequences)
    # Of the student's head the loss makes the gradients at once; of the teachers' there is a forward pass alone.
    head = 3 * head_flops(student, sum(sequences)) + sum(head_flops(t.spec, sum(sequences)) for t in planned)
    sent = forward_traffic(student, parallel, blocks, sum(sequences) / replicas, size)
    again = backward_traffic(student, parallel, blocks, sum(sequences) / replicas, size)
    flops = forward + (head if plan.output else 0)
    costs.append(wire.cost("student forward", flops, flops / (world * rate), sent, parallel))
    if config.recompute.granularity == "full":
        without = dataclasses.replace(sent, pipeline=0.0)
        costs.append(wire.cost("student recompute", forward, forward / (world * rate), without, parallel))
    flops = backward_flops(student, blocks, sequences)
    costs.append(wire.cost("student backward", flops, flops / (world * rate), again, parallel))
    costs.append(_update(config, student, planned, wire))
    return Estimate(tuple(costs), bubble_of_teacher, idle, world, hardware)


def bubble(layout: ParallelConfig, micro_batches: int) -> float:
    """Idle time of a pipeline for each busy second (Narayanan et al., arXiv 2104.04473): (p - 1) / (v m)."""
    return (layout.pipeline - 1) / ((layout.virtual_pipeline or 1) * micro_batches)


def decode_seconds(config: Config, spec: ModelSpec, rows: int, lengths: Lengths, hardware: Hardware) -> float:
    """Seconds of one token of `rows` rows that are generated at once by a replica: weights are read, and keys and
    values of the tokens so far, on average half of the longest response behind the prompt; or the kernels are launched,
    if that takes longer. Pipeline stages take turns."""
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    dense, experts = rank_parameters(spec, _share(config, spec), 0, lm_head=True)
    hit = 1 - (1 - spec.experts_per_token / spec.num_experts) ** (rows * parallel.expert) if spec.num_experts else 0.0
    seen = lengths.sequence - lengths.response / 2
    heads = spec.num_query_groups / parallel.tensor
    keys = 2 * spec.num_layers / parallel.pipeline * heads * spec.head_dim * size * seen
    read = (dense + experts * hit) * size + rows * keys
    seconds = read / (hardware.memory_bytes * hardware.memory_share)
    return parallel.pipeline * max(seconds, hardware.block_seconds * spec.num_layers / parallel.pipeline)


class _Wire:
    """From bytes to seconds: what stays in a node goes over NVLink."""

    def __init__(self, hardware: Hardware, world: int) -> None:
        self.hardware = hardware
        self.world = world

    def cost(
        self, name: str, flops: float, seconds: float, traffic: Traffic, layout: ParallelConfig, hidden: bool = False
    ) -> Cost:
        """`hidden`: sent while the rank computes."""
        hardware, stretches = self.hardware, reach(layout, self.world)
        sent = {True: 0.0, False: 0.0}
        for kind, size in dataclasses.asdict(traffic).items():
            sent[stretches[kind] <= hardware.gpus_per_node] += size
        wait = (sent[True] / hardware.nvlink_bytes + sent[False] / hardware.network_bytes) / hardware.link_share
        return Cost(name, flops, sent[True], sent[False], seconds if hidden else seconds + wait)


def _rate(hardware: Hardware, spec: ModelSpec, *, in_fp8: bool) -> float:
    """Operations that a rank is assumed to do in a second."""
    share = hardware.expert_share if spec.num_experts else hardware.fp8_share if in_fp8 else hardware.matrix_share
    return share * (hardware.fp8_flops if in_fp8 else hardware.bf16_flops)


def _micro_batches(config: Config, rollouts: int, lengths: Lengths, replicas: int) -> int:
    """Of a replica, each as full as whole sequences of the most tokens make it."""
    fit = max(config.batch.max_tokens_per_micro_batch // lengths.sequence, 1) if config.batch.packing else 1
    return math.ceil(math.ceil(rollouts / replicas) / fit)


def _share(config: Config, spec: ModelSpec) -> Share:
    parallel = config.parallel
    stages = even_stages(spec.num_layers, parallel.pipeline, parallel.virtual_pipeline or 1)
    return Share(parallel.tensor, parallel.pipeline, parallel.expert, stages)


def _rollout(config: Config, spec: ModelSpec, lengths: Lengths, wire: _Wire) -> list[Cost]:
    """Reading prompts, and a token after another; each data- and context-parallel rank generates for itself."""
    parallel, size, hardware = config.parallel, BYTES[config.precision.dtype], wire.hardware
    if config.rollout.engine != "megatron":
        return []
    replicas = wire.world // (parallel.tensor * parallel.pipeline)
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    own, prompt = math.ceil(rollouts / replicas), lengths.sequence - lengths.response
    alone = parallel.model_copy(update={"context": 1, "sequence": False})
    blocks = spec.num_layers
    read = forward_flops(spec, blocks, [prompt] * rollouts)
    seconds = read / (wire.world * _rate(hardware, spec, in_fp8=False)) * parallel.pipeline
    sent = forward_traffic(spec, alone, blocks, own * prompt, size)
    made = forward_flops(spec, blocks, [lengths.sequence] * rollouts) - read
    made += head_flops(spec, rollouts * lengths.response)
    tokens = lengths.response * decode_seconds(config, spec, own, lengths, hardware)
    of_tokens = forward_traffic(spec, alone, blocks, own * lengths.response, size)
    return [
        wire.cost("rollout: prompts", read, seconds, sent, alone),
        wire.cost("rollout: tokens", made, tokens, of_tokens, alone),
    ]


def _rows(
    config: Config, planned: Sequence[PlannedTeacher], lengths: Lengths, bridge_rank: int | None, world: int
) -> Traffic:
    """Teachers' states that travel, on an average rank: each selected token of each compared layer to every rank that
    reads it, none of which has it already."""
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    plan = planned[0].plan
    if all(teacher.plan.aligned for teacher in planned) and len(planned) == 1:
        return Traffic()
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    rows = rollouts * min(most_selected(config.loss), lengths.response)
    row = 4 * bridge_rank if bridge_rank else max(t.spec.hidden_size for t in planned) * size
    layers = len({pair.teacher for pair in plan.pairs}) + plan.output
    return Traffic(targets=rows * layers * row * (1 if parallel.sequence else parallel.tensor) / world)


def _update(config: Config, spec: ModelSpec, planned: Sequence[PlannedTeacher], wire: _Wire) -> Cost:
    """Gradients reduced, optimizer state read and written, parameters gathered."""
    parallel, size, hardware = config.parallel, BYTES[config.precision.dtype], wire.hardware
    head = spec.tied_embeddings or planned[0].plan.output
    dense, experts = rank_parameters(spec, _share(config, spec), 0, lm_head=head)
    traffic = update_traffic(parallel, dense, experts, wire.world, size)
    copies = wire.world // (parallel.tensor * parallel.pipeline) if parallel.distributed_optimizer else 1
    state = (dense + experts) / copies * (state_bytes(config) + 4 + linear_bytes(config, teacher=False))
    seconds = 2 * state / (hardware.memory_bytes * hardware.memory_share)
    hidden = parallel.overlap_grad_reduce and parallel.overlap_param_gather
    return wire.cost("update", 0, seconds, traffic, parallel, hidden=hidden)
