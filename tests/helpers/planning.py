"""Small runs whose memory and time tests predict, and the rollouts that fill their micro-batches."""

from __future__ import annotations

import torch

from megatron_oprd.config import Config, load_config
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.launch.setup import Setup
from megatron_oprd.model_spec import DeltaNet, ModelSpec
from megatron_oprd.models.precision import Precision
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.update_trace import Footprint, trace_update
from megatron_oprd.testing.distributed import result_of
from megatron_oprd.types import Rollout

LENGTHS = Lengths(sequence=128, response=64)


def dense_spec(*, layers: int, hidden: int, vocabulary: int, **changes: object) -> ModelSpec:
    """Return a dense model with heads of width 64."""
    sizes = dict(
        architecture="Qwen2ForCausalLM",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=3 * hidden,
        num_attention_heads=hidden // 64,
        num_query_groups=hidden // 64,
        head_dim=64,
        vocab_size=vocabulary,
        norm_epsilon=1e-6,
        rope_theta=1e6,
        rotary_dim=64,
        max_position_embeddings=32768,
        tied_embeddings=True,
        qkv_bias=True,
        qk_norm=False,
    )
    return ModelSpec(**{**sizes, **changes})


def expert_spec(*, layers: int, hidden: int, vocabulary: int, **changes: object) -> ModelSpec:
    """Return a model with 8 experts in every layer, 2 per token."""
    experts = dict(num_experts=8, experts_per_token=2, moe_ffn_hidden_size=hidden, norm_topk_prob=True)
    family = dict(architecture="Qwen3MoeForCausalLM", qkv_bias=False, qk_norm=True, tied_embeddings=False)
    sparse = tuple(range(layers))
    changes = {**family, **experts, "sparse_layers": sparse, **changes}
    return dense_spec(layers=layers, hidden=hidden, vocabulary=vocabulary, **changes)


def shared_expert_spec(*, layers: int, hidden: int, vocabulary: int) -> ModelSpec:
    """Return a model with a shared expert beside 8 experts in every layer."""
    family = dict(architecture="Qwen2MoeForCausalLM", qkv_bias=True, qk_norm=False, shared_ffn_hidden_size=2 * hidden)
    return expert_spec(layers=layers, hidden=hidden, vocabulary=vocabulary, **family)


def hybrid_spec(*, layers: int, hidden: int, vocabulary: int, **changes: object) -> ModelSpec:
    """Return a dense model with Gated DeltaNet in three of four layers."""
    linear = tuple(layer for layer in range(layers) if layer % 4 != 3)
    family = dict(architecture="Qwen3_5ForCausalLM", qkv_bias=False, qk_norm=True, output_gate=True)
    sizes = dict(zero_centered_norms=True, delta_net=DeltaNet(4, 8, 32, 32, 4), linear_layers=linear)
    return dense_spec(layers=layers, hidden=hidden, vocabulary=vocabulary, **{**family, **sizes, **changes})


def replay_config(tokens: int, *overrides: str) -> Config:
    """Return the configuration of a run with replayed rollouts and micro-batches of at most `tokens` tokens."""
    paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
    size = f"batch.max_tokens_per_micro_batch={tokens}"
    return load_config(None, [*paths, "rollout.engine=replay", "precision.dtype=bf16", size, *overrides])


def planned_run(
    config: Config,
    spec: ModelSpec,
    world_size: int = 1,
    *,
    lengths: Lengths = LENGTHS,
    teacher: ModelSpec | None = None,
) -> PlannedRun:
    """Return the run of `config` with one teacher, which has the student's sizes unless `teacher` is given."""
    planned = plan_teacher(config, spec, teacher or spec, "", world_size)
    setup = Setup(spec, planned.plan.student_stages, {"": planned}, Precision(), world_size, None)
    return PlannedRun(config, setup, lengths)


def filling_rollouts(tokens: int, count: int = 2) -> list[Rollout]:
    """Return `count` rollouts with a prompt of 8 tokens that together have `tokens` tokens."""
    response = tokens // count - 8
    return [Rollout((1,) * 8, (2,) * response, (1,) * response, "replay") for _ in range(count)]


def trace_in_process(run: PlannedRun, rollouts: list[Rollout], *, rank: int = 0, micro_batches: int = 1) -> Footprint:
    """Return `trace_update` from a process of its own."""
    return result_of(_trace, run, rollouts, rank, micro_batches)


def _trace(run: PlannedRun, rollouts: list[Rollout], rank: int, micro_batches: int) -> Footprint:
    return trace_update(run, rollouts, rank=rank, micro_batches=micro_batches)


def peaks_of_two_traces(run: PlannedRun, rollouts: list[Rollout]) -> tuple[int, int]:
    """Return the peaks of two traces that follow each other in one process."""
    return result_of(_trace_twice, run, rollouts)


def _trace_twice(run: PlannedRun, rollouts: list[Rollout]) -> tuple[int, int]:
    first, second = (trace_update(run, rollouts, rank=0).peak for _ in range(2))
    assert not torch.distributed.is_initialized()
    return first, second
