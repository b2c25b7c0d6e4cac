"""How much memory a rank will need, by arithmetic: an estimate to plan with, made before any model is built."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_oprd.config import Config, LossConfig, ParallelConfig
from megatron_oprd.hf.names import entries, megatron_shapes, padded_vocab_size, shard_shape
from megatron_oprd.models.layer_plan import LayerPlan, PlannedTeacher
from megatron_oprd.planning.device_formulas import BYTES, is_linear, linear_bytes, state_bytes
from megatron_oprd.types import ModelSpec


def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    return sum(math.prod(shape) for shape in megatron_shapes(spec).values())


@dataclass(frozen=True)
class Share:
    """What a rank holds of a model: the layout's sizes and the blocks of each stage."""

    tensor: int
    pipeline: int
    expert: int
    stages: tuple[int, ...]  # chunk by chunk under virtual pipelining


def predict_memory(
    config: Config,
    student: ModelSpec,
    planned: Sequence[PlannedTeacher],
    world: int,
    bridge_rank: int | None = None,
) -> dict[str, int]:
    """Bytes on the fullest of `world` ranks, by purpose. `bridge_rank`: r of a bridge between the models.

    Gradients are fp32; the optimizer's state (`state_bytes`) is divided over the ranks that hold the same parameters by
    the distributed optimizer; what is never trained still counts as trained. Weights in FP8: `linear_bytes`.
    Activations: `block_bytes` of every block, or block inputs and one block under full recomputation, of every
    micro-batch that a pipeline keeps.
    """
    plan = planned[0].plan
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    copies = world // (parallel.tensor * parallel.pipeline)  # of a parameter, over data- and context-parallel ranks
    expert_copies = world // (parallel.expert * parallel.pipeline)  # experts are not divided by tensor parallelism
    of_student = Share(parallel.tensor, parallel.pipeline, parallel.expert, plan.student_stages)
    ranks = range(parallel.pipeline)
    students = [rank_parameters(student, of_student, rank, lm_head=True) for rank in ranks]
    trained = max(map(sum, students))
    copies_in_fp8 = (linear_bytes(config, teacher=False) - size) * max(
        _linear(config, student, of_student, rank) for rank in ranks
    )
    frozen = [_teacher_bytes(config, teacher, teacher.layout or parallel) for teacher in planned]
    heads = [padded_vocab_size(student, parallel.tensor) // parallel.tensor * t.spec.hidden_size for t in planned]
    in_memory = sum(frozen) if config.teachers_in_memory == "all" else max(frozen)
    if parallel.distributed_optimizer and config.optimizer.name == "adamw":
        kept = max(dense // copies + experts // expert_copies for dense, experts in students)
    else:
        kept = trained
    tokens = config.batch.max_tokens_per_micro_batch // parallel.context
    full = config.recompute.granularity == "full"
    row_bytes = 4 * bridge_rank if bridge_rank else planned[0].spec.hidden_size * size
    blocks = _blocks_in_flight(config, plan, copies // parallel.context)
    inputs = student.hidden_size * size / (parallel.tensor if parallel.sequence else 1)
    a_block = max(block_bytes(student, layer, parallel, size) for layer in {0, *student.sparse_layers[:1]})
    return {
        "student weights": trained * size + copies_in_fp8,
        "student gradients": trained * 4,
        "optimizer state": int(kept * state_bytes(config)),
        "teacher weights": in_memory + (sum(heads) * size if plan.output else 0),
        "teacher states": (0 if planned[0].config.offload_targets else _target_bytes(config, plan, copies, row_bytes)),
        "activations": int(tokens * (inputs * blocks + a_block if full else a_block * blocks)),
    }


def block_bytes(spec: ModelSpec, layer: int, parallel: ParallelConfig, size: int) -> float:
    """Activations of one block (0-based) that a rank keeps for the backward pass, bytes a token.

    In bf16, of the modules without fused kernels: 16 a hidden unit (input, norms, residuals), 8 a unit of the queries
    and 6 of the keys, with norms of their own 6 more, 10 a unit of a dense MLP; with experts, for each choice of a
    token 2 a hidden unit and 12 a unit of the expert, and 9 an expert for the router. `tests/unit/test_memory.py` holds
    it against traced updates. What tensor parallelism divides it divides; the hidden units with sequence parallelism
    alone.
    """
    hidden = spec.hidden_size / (parallel.tensor if parallel.sequence else 1)
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    norms = 6 * (queries + keys) if spec.qk_norm else 0
    total = 16 * hidden + (8 * queries + 6 * keys + norms) / parallel.tensor
    if layer not in spec.sparse_layers:
        return (total + 10 * spec.ffn_hidden_size / parallel.tensor) * size / 2
    rows = 1 / (parallel.tensor if parallel.sequence else 1)
    choice = 2 * spec.hidden_size + 12 * spec.moe_ffn_hidden_size
    return (total + rows * (spec.experts_per_token * choice + 9 * spec.num_experts)) * size / 2


def most_selected(loss: LossConfig) -> int:
    """Tokens of one response that the loss reads at most."""
    terms = [(loss.representation.positions, loss.representation.k)] if loss.reads_layers else []
    terms += [(loss.output.positions, loss.output.positions_k)] if loss.reads_output else []
    return max({"last": 1, "all": sys.maxsize}.get(positions, k) for positions, k in terms)


def _teacher_bytes(config: Config, teacher: PlannedTeacher, layout: ParallelConfig) -> int:
    share, size = Share(layout.tensor, layout.pipeline, layout.expert, teacher.plan.teacher_stages), 0
    for rank in range(layout.pipeline):
        held = sum(rank_parameters(teacher.spec, share, rank, lm_head=False)) * BYTES[config.precision.dtype]
        saved = BYTES[config.precision.dtype] - linear_bytes(config, teacher=True)
        size = max(size, held - saved * _linear(config, teacher.spec, share, rank))
    return size


def _linear(config: Config, spec: ModelSpec, share: Share, pipeline_rank: int) -> int:
    """Parameters of one pipeline rank in linear layers that may compute in FP8."""
    depth = sum(share.stages)
    return sum(rank_parameters(spec, share, pipeline_rank, lm_head=False, only=lambda n: is_linear(n, config, depth)))


def _blocks_in_flight(config: Config, plan: LayerPlan, data_size: int) -> int:
    """Blocks whose activations the first pipeline rank keeps at once: one micro-batch for every pipeline stage, twice
    the warm-up when stages are interleaved, and no more micro-batches than there can be."""
    pipeline, virtual = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    chunks = pipeline if virtual == 1 else 2 * (pipeline - 1) + (virtual - 1) * pipeline + 1
    most = math.ceil(config.rollout.prompts_per_step * config.rollout.samples_per_prompt / data_size)
    return max(plan.student_stages) * min(chunks, virtual * most)


def rank_parameters(
    spec: ModelSpec,
    share: Share,
    pipeline_rank: int,
    *,
    lm_head: bool,
    only: Callable[[str], bool] = lambda name: True,
) -> tuple[int, int]:
    """Parameters of one pipeline rank, on each of its tensor- and expert-parallel ranks: those of experts apart.
    `only`: those whose names it takes."""
    ends = list(itertools.accumulate(share.stages, initial=0))
    mine = range(pipeline_rank, len(share.stages), share.pipeline)
    blocks = {block for stage in mine for block in range(ends[stage], ends[stage + 1])}
    first, last = 0 in mine, len(share.stages) - 1 in mine

    def held(name: str) -> bool:
        if not only(name):
            return False
        if name.startswith("decoder.layers."):
            return int(name.split(".")[2]) in blocks
        if name.startswith("embedding"):
            return first or (last and lm_head and spec.tied_embeddings)
        return last and (lm_head or not name.startswith("output_layer"))

    shapes = megatron_shapes(spec, share.tensor)
    dense = experts = 0
    for entry in entries(spec):
        count = math.prod(shard_shape(entry, shapes[entry.megatron], share.tensor)) if held(entry.megatron) else 0
        if entry.expert is None:
            dense += count
        else:
            experts += count
    return dense, experts // share.expert


def _target_bytes(config: Config, plan: LayerPlan, copies: int, row_bytes: int) -> int:
    parallel = config.parallel
    samples = config.rollout.prompts_per_step * config.rollout.samples_per_prompt / copies
    rows = samples * min(most_selected(config.loss), config.rollout.max_new_tokens)
    if plan.aligned and parallel.pipeline == 1:  # streamed: no more than a micro-batch has
        rows = min(rows, config.batch.max_tokens_per_micro_batch / parallel.context)
    owners = [rank for _, rank in map(plan.student_place, plan.student_layers)]
    layers = max((owners.count(rank) for rank in set(owners)), default=0)
    return int(layers * rows * row_bytes / (parallel.tensor if parallel.sequence else 1))
