"""Memory of a rank by formula. The dry run prints it if an update cannot be traced."""

from __future__ import annotations

import math
import sys

from megatron_oprd.config import Config, LossConfig, ParallelConfig
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.layer_plan import PlannedTeacher
from megatron_oprd.planning.delta_net_costs import stored_bytes
from megatron_oprd.planning.device_formulas import BYTES, linear_bytes, may_be_fp8, optimizer_state_bytes
from megatron_oprd.planning.parameter_counts import ModelDivision, rank_parameters
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.rollout.horizon import longest_response


def predict_memory(run: PlannedRun) -> dict[str, int]:
    """Return the bytes on the fullest rank, by purpose.

    - Weights have `precision.dtype`; for weights in FP8 see `linear_bytes`.
    - Gradients are fp32. Frozen parameters count as trained.
    - Optimizer state: `optimizer_state_bytes`. The distributed optimizer divides it over the ranks that have the same
      parameters, and the float32 average of `teacher.ema` in the same way.
    - Activations: `layer_activation_bytes` of every layer; with full recomputation the inputs of all layers and the
      activations of one. A pipeline has the activations of several micro-batches.
    """
    config, student, plan = run.config, run.setup.student, run.setup.layer_plan
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    copies = run.setup.world_size // (parallel.tensor * parallel.pipeline)  # of a dense parameter
    expert_copies = run.setup.world_size // (parallel.expert * parallel.pipeline)  # of an expert
    division = ModelDivision(parallel.tensor, parallel.pipeline, parallel.expert, plan.student_stages)
    pipeline_ranks = range(parallel.pipeline)
    by_rank = [rank_parameters(student, division, rank, lm_head=True) for rank in pipeline_ranks]
    trained = max(map(sum, by_rank))
    fp8_copies = (linear_bytes(config, teacher=False) - size) * max(
        _linear_parameters(config, student, division, rank) for rank in pipeline_ranks
    )
    teachers = list(run.setup.teachers.values())
    teacher_bytes = [
        len(teacher.folders) * _teacher_bytes(config, teacher, teacher.layout or parallel) for teacher in teachers
    ]
    widths = [teacher.spec.hidden_size * (1 + teacher.config.extrapolates_output) for teacher in teachers]
    heads = run.lm_head_rows * sum(widths) if plan.output else 0
    if parallel.distributed_optimizer and config.optimizer.name == "adamw":
        with_state = max(dense // copies + experts // expert_copies for dense, experts in by_rank)
    else:
        with_state = trained
    average = 4 * with_state if teachers[0].config.follows_student else 0
    of_teachers = (sum if config.teachers_in_memory == "all" else max)(teacher_bytes)
    return {
        "student weights": trained * size + fp8_copies,
        "student gradients": trained * 4,
        "optimizer state": int(with_state * optimizer_state_bytes(config)),
        "teacher weights": of_teachers + heads * size + average,
        "teacher states": 0 if teachers[0].config.offload_targets else _target_bytes(run, copies),
        "activations": _activation_bytes(run, copies // parallel.context),
    }


def layer_activation_bytes(spec: ModelSpec, layer: int, parallel: ParallelConfig, bytes_per_number: int) -> float:
    """Return the activations of one layer (0-based) that a rank stores for the backward pass, in bytes per token.

    For modules without fused kernels, in bf16:

    - 16 per hidden unit: input, norms, residuals
    - 8 per unit of the queries, 6 per unit of the keys, and 6 more per unit of both if they have norms; 6 more per unit
      of the queries with an output gate
    - 4 per hidden unit and 2 per unit of queries and keys for norms that multiply by 1 + weight
    - in a layer with Gated DeltaNet `stored_bytes` in place of queries and keys
    - 6 per unit of a dense MLP
    - in a layer with experts: for each expert of a token 2 per hidden unit and 8 per unit of the expert; 9 per expert
      for the router; with a shared expert 2 per hidden unit and 6 per unit of that expert

    Tensor parallelism divides queries, keys, Gated DeltaNet, the dense MLP and the shared expert. Sequence parallelism
    divides the rest.
    `tests/unit/test_memory_formulas.py` compares this formula with traced updates.
    """
    hidden = spec.hidden_size / (parallel.tensor if parallel.sequence else 1)
    mixing = _mixing_bytes(spec, layer, parallel.context)
    total = (20 if spec.zero_centered_norms else 16) * hidden + mixing / parallel.tensor
    if layer not in spec.sparse_layers:
        return (total + 6 * spec.ffn_hidden_size / parallel.tensor) * bytes_per_number / 2
    rows = 1 / (parallel.tensor if parallel.sequence else 1)
    per_expert = 2 * spec.hidden_size + 8 * spec.moe_ffn_hidden_size
    if spec.shared_ffn_hidden_size:
        total += 2 * hidden + 6 * spec.shared_ffn_hidden_size / parallel.tensor
    return (total + rows * (spec.experts_per_token * per_expert + 9 * spec.num_experts)) * bytes_per_number / 2


def _mixing_bytes(spec: ModelSpec, layer: int, context: int) -> float:
    """Return the bytes per token of attention, or of Gated DeltaNet for the tokens of all context-parallel ranks."""
    if spec.delta_net is not None and layer in spec.linear_layers:
        return context * stored_bytes(spec.delta_net)
    queries, keys = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim
    norms = (8 if spec.zero_centered_norms else 6) * (queries + keys) if spec.qk_norm else 0
    return (14 if spec.output_gate else 8) * queries + 6 * keys + norms


def most_selected_tokens(loss: LossConfig) -> int:
    """Return the largest number of tokens of one response that the loss can select."""
    terms = [(loss.representation.positions, loss.representation.k)] if loss.reads_layers else []
    terms += [(loss.output.positions, loss.output.positions_k)] if loss.reads_output else []
    return max({"last": 1, "all": sys.maxsize}.get(positions, k) for positions, k in terms)


def target_row_bytes(run: PlannedRun, width: int) -> int:
    """Return the bytes of one teacher state of `width` numbers: with a bridge, its r numbers in fp32."""
    return 4 * run.bridge_rank if run.bridge_rank else width * BYTES[run.config.precision.dtype]


def _teacher_bytes(config: Config, teacher: PlannedTeacher, layout: ParallelConfig) -> int:
    division = ModelDivision(layout.tensor, layout.pipeline, layout.expert, teacher.plan.teacher_stages)
    size = BYTES[config.precision.dtype]
    saved = size - linear_bytes(config, teacher=True)
    return max(
        sum(rank_parameters(teacher.spec, division, rank, lm_head=False)) * size
        - saved * _linear_parameters(config, teacher.spec, division, rank)
        for rank in range(layout.pipeline)
    )


def _linear_parameters(config: Config, spec: ModelSpec, division: ModelDivision, pipeline_rank: int) -> int:
    """Return the parameters of one pipeline rank that may be in FP8."""
    depth = sum(division.stages)
    return sum(
        rank_parameters(spec, division, pipeline_rank, lm_head=False, only=lambda name: may_be_fp8(name, config, depth))
    )


def _activation_bytes(run: PlannedRun, data_size: int) -> int:
    config, student, parallel = run.config, run.setup.student, run.config.parallel
    size = BYTES[config.precision.dtype]
    tokens = config.batch.max_tokens_per_micro_batch // parallel.context
    layers = _layers_in_flight(run, data_size)
    kinds = {0, *student.sparse_layers[:1], *student.linear_layers[:1]}
    one_layer = max(layer_activation_bytes(student, layer, parallel, size) for layer in kinds)
    if config.recompute.granularity == "full":
        layer_input = student.hidden_size * size / (parallel.tensor if parallel.sequence else 1)
        return int(tokens * (layer_input * layers + one_layer))
    return int(tokens * (one_layer * layers))


def _layers_in_flight(run: PlannedRun, data_size: int) -> int:
    """Return the number of layers whose activations the first pipeline rank has at the same time.

    It has one micro-batch for each pipeline stage. With interleaved stages it has as many as Megatron-Core's warm-up.
    """
    pipeline, virtual = run.config.parallel.pipeline, run.config.parallel.virtual_pipeline or 1
    chunks = pipeline if virtual == 1 else 2 * (pipeline - 1) + (virtual - 1) * pipeline + 1
    micro_batches = math.ceil(run.rollouts_per_step / data_size)
    return max(run.setup.layer_plan.student_stages) * min(chunks, virtual * micro_batches)


def _target_bytes(run: PlannedRun, copies: int) -> int:
    config, plan, parallel = run.config, run.setup.layer_plan, run.config.parallel
    first_teacher = next(iter(run.setup.teachers.values()))
    rows = run.rollouts_per_step / copies * min(most_selected_tokens(config.loss), longest_response(config))
    if plan.aligned and parallel.pipeline == 1:  # the teacher is streamed: targets of one micro-batch exist
        rows = min(rows, config.batch.max_tokens_per_micro_batch / parallel.context)
    owners = [rank for _, rank in map(plan.student_place, plan.student_layers)]
    layers = max((owners.count(rank) for rank in set(owners)), default=0)
    row_bytes = target_row_bytes(run, first_teacher.spec.hidden_size)
    return int(layers * rows * row_bytes / (parallel.tensor if parallel.sequence else 1))
