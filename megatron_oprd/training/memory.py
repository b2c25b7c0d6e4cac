"""How much memory a rank will need, by arithmetic: an estimate to plan with, made before any model is built."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_oprd.config import Config
from megatron_oprd.hf.names import entries, megatron_shapes, shard_shape
from megatron_oprd.models.layer_plan import LayerPlan
from megatron_oprd.types import ModelSpec

BYTES = {"bf16": 2, "fp32": 4}


def count_parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, without vocabulary padding."""
    return sum(math.prod(shape) for shape in megatron_shapes(spec).values())


def predict_memory(
    config: Config, student: ModelSpec, teacher: ModelSpec, plan: LayerPlan, data_parallel: int
) -> dict[str, int]:
    """Bytes on the fullest rank, by purpose.

    Gradients are fp32; AdamW keeps two fp32 moments, and an fp32 copy of bf16 weights, divided over data-parallel ranks
    by the distributed optimizer. Activations: 34 bytes a token, hidden unit and block in bf16 (Korthikanti et al.,
    arXiv 2205.05198, without the attention scores that SDPA never stores), or block inputs under full recomputation.
    """
    size = BYTES[config.precision.dtype]
    stages = range(config.parallel.pipeline)
    trained = max(_stage_parameters(student, plan.student_stages, s, config, lm_head=True) for s in stages)
    frozen = max(_stage_parameters(teacher, plan.teacher_stages, s, config, lm_head=False) for s in stages)
    adamw = config.optimizer.name == "adamw"
    state = (8 if adamw else 0) + (4 if size == 2 else 0)
    cut = data_parallel if config.parallel.distributed_optimizer and adamw else 1
    tokens = config.batch.max_tokens_per_micro_batch
    blocks = max(plan.student_stages)
    per_token = 2 * size / 2 if config.recompute.granularity == "full" else 34 * size / 2
    return {
        "student weights": trained * size,
        "student gradients": trained * 4,
        "optimizer state": trained * state // cut,
        "teacher weights": frozen * size,
        "teacher states": _target_bytes(config, plan, teacher, data_parallel, size),
        "activations": int(tokens * student.hidden_size * blocks * per_token / config.parallel.tensor),
    }


def _stage_parameters(spec: ModelSpec, stages: Sequence[int], stage: int, config: Config, *, lm_head: bool) -> int:
    first, last = sum(stages[:stage]), sum(stages[: stage + 1])
    is_last = stage == len(stages) - 1

    def held(name: str) -> bool:
        if name.startswith("decoder.layers."):
            return first <= int(name.split(".")[2]) < last
        if name.startswith("embedding"):
            return stage == 0 or (is_last and lm_head and spec.tied_embeddings)
        return is_last and (lm_head or not name.startswith("output_layer"))

    tensor_size = config.parallel.tensor
    shapes = megatron_shapes(spec, tensor_size)
    shards = (shard_shape(e, shapes[e.megatron], tensor_size) for e in entries(spec) if held(e.megatron))
    return sum(math.prod(shape) for shape in shards)


def _target_bytes(config: Config, plan: LayerPlan, teacher: ModelSpec, data_parallel: int, size: int) -> int:
    representation = config.loss.representation
    most = config.rollout.max_new_tokens
    selected = {"last": 1, "last_k": min(representation.k, most), "first_k": min(representation.k, most), "all": most}
    samples = math.ceil(config.rollout.prompts_per_step / data_parallel) * config.rollout.samples_per_prompt
    owners = [plan.student_stage(layer) for layer in plan.student_layers]
    layers = max(owners.count(stage) for stage in set(owners))
    return layers * samples * selected[representation.positions] * teacher.hidden_size * size
