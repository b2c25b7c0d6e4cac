"""The peak memory of an update that is traced without values is that of the real one, and its parts are what they are
called."""

import dataclasses
import gc
import json
import os
import subprocess
import sys

import psutil
import pytest
import torch

from megatron_oprd.config import load_config
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.models.build import DTYPES, build_model
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.planning.memory_formulas import Share, count_parameters, rank_parameters
from megatron_oprd.planning.update_trace import trace_update
from megatron_oprd.runtime import platform
from megatron_oprd.training.global_batch import GlobalBatch
from megatron_oprd.training.student import build_student
from megatron_oprd.training.student_step import student_step
from megatron_oprd.training.teacher import Teacher, build_frozen
from megatron_oprd.training.teacher_pass import teacher_pass
from megatron_oprd.types import LongRope, ModelSpec, Rollout
from tests.helpers.distributed import result_of
from tests.helpers.memory import HONEST

DEVICE = torch.device("cpu")
FULL = ("recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1")


def spec_of(*, layers, hidden, vocabulary, **changes):
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


def with_experts(*, layers, hidden, vocabulary):
    """Every layer has 8 experts, of which a token goes to 2."""
    experts = dict(num_experts=8, experts_per_token=2, moe_ffn_hidden_size=hidden, norm_topk_prob=True)
    family = dict(architecture="Qwen3MoeForCausalLM", qkv_bias=False, qk_norm=True, tied_embeddings=False)
    sparse = tuple(range(layers))
    return spec_of(layers=layers, hidden=hidden, vocabulary=vocabulary, **family, **experts, sparse_layers=sparse)


SPECS = {"dense": spec_of, "experts": with_experts}


def config_of(tokens, *overrides):
    paths = [f"{key}=unused" for key in ("student.path", "teacher.path", "train.run_dir", "rollout.path")]
    size = f"batch.max_tokens_per_micro_batch={tokens}"
    return load_config(None, [*paths, "rollout.engine=replay", size, *overrides])


def rollouts_of(tokens, count=2):
    response = tokens // count - 8
    return [Rollout((1,) * 8, (2,) * response, (1,) * response, "replay") for _ in range(count)]


def measure(tokens, kind, sizes, overrides):
    """Bytes that the second update of a real process adds at its peak to what the process has before its models."""
    start_process(DEVICE)
    small = dict(layers=1, hidden=128, vocabulary=256)
    update(64, SPECS[kind](**small), overrides)  # what the first operations load stays
    gc.collect()
    before = psutil.Process().memory_info().rss
    update(tokens, SPECS[kind](**sizes), overrides)
    return platform.peak_memory_bytes(DEVICE) - before


def update(tokens, spec, overrides):
    """Two updates, the second one's peak measured."""
    config, rollouts = config_of(tokens, *overrides), rollouts_of(tokens)
    topology = build_topology(config.parallel, DEVICE, seed=0)
    planned = plan_teacher(config, spec, spec)
    plan = planned.plan
    global_batch = GlobalBatch(tuple(rollouts), (0,) * len(rollouts), config.loss, config.batch, spec)
    micro_batches = global_batch.micro_batches(topology)
    dtype = DTYPES[config.precision.dtype]
    stage = build_model(spec, topology, dtype, stages=plan.student_stages, recompute=config.recompute)
    frozen = build_frozen(planned, topology, dtype)
    for parameter in [*stage.parameters(), *frozen.parameters()]:
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else torch.nn.init.ones_(parameter)
    frozen.eval().requires_grad_(False)
    teacher = Teacher(lambda: frozen, topology, plan, spec.hidden_size)
    student = build_student(stage, config, plan, topology)
    for _ in range(2):
        platform.reset_peak_memory(DEVICE)
        targets, _ = teacher_pass([teacher], global_batch, micro_batches, topology)
        student_step(student, topology, plan, config.loss, global_batch, micro_batches, targets)


def traced(config, spec, rollouts, **where):
    """`trace_update` in a process of its own."""
    return result_of(_trace, config, spec, rollouts, where)


def _trace(config, spec, rollouts, where):
    os.environ["WORLD_SIZE"] = str(where["world"])
    teacher = plan_teacher(config, spec, spec)
    first, second = (trace_update(config, spec, [teacher], rollouts, **where) for _ in range(2))
    assert first.peak == pytest.approx(second.peak, abs=8)  # a scalar of mcore's class for experts stays
    assert not torch.distributed.is_initialized()
    return first


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("dense", ("precision.dtype=fp32",)),
        ("dense", ("precision.dtype=bf16", *FULL)),
        ("experts", ("precision.dtype=fp32",)),
        ("experts", ("precision.dtype=bf16", *FULL)),
    ],
)
def test_the_peak_is_that_of_a_real_update(kind, overrides):
    """Experts of a random router are not alike, and yet take together what alike ones would."""
    sizes = {"layers": 4, "hidden": 512, "vocabulary": 8192}
    case = {"tokens": 2048, "kind": kind, "sizes": sizes, "overrides": overrides}
    command = [sys.executable, "-m", "tests.unit.test_update_trace", json.dumps(case)]
    environment = {**os.environ, **HONEST, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    predicted = traced(config_of(2048, *overrides), SPECS[kind](**sizes), rollouts_of(2048), rank=0, world=1)
    assert predicted.peak == pytest.approx(int(output.split()[-1]), rel=0.1)


LAYOUTS = {  # processes, layout, rank
    "one": (1, (), 0),
    "tensor": (2, ("parallel.tensor=2",), 1),
    "sequence": (2, ("parallel.tensor=2", "parallel.sequence=true"), 0),
    "context": (2, ("parallel.context=2",), 1),
    "first of a pipeline": (2, ("parallel.pipeline=2",), 0),
    "last of a pipeline": (2, ("parallel.pipeline=2",), 1),
    "virtual": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 1),
    "all": (16, ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.context=2"), 11),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_are_those_of_the_arithmetic(layout):
    world, overrides, rank = LAYOUTS[layout]
    config = config_of(256, "precision.dtype=bf16", *overrides)
    parallel, spec = config.parallel, spec_of(layers=5, hidden=128, vocabulary=1024)
    stages = even_stages(5, parallel.pipeline, parallel.virtual_pipeline or 1)
    share = Share(parallel.tensor, parallel.pipeline, 1, stages)
    pipeline_rank = rank // (world // parallel.pipeline)
    trained, _ = rank_parameters(spec, share, pipeline_rank, lm_head=True)
    footprint = traced(config, spec, rollouts_of(256), rank=rank, world=world, micro_batches=3)
    assert footprint.weights == pytest.approx(2 * trained, rel=0.01)
    assert footprint.gradients == pytest.approx(4 * trained, rel=0.01)
    copies = world // (parallel.tensor * parallel.pipeline)
    assert footprint.optimizer == pytest.approx(12 * trained / copies, rel=0.01)
    assert footprint.targets > 0 and footprint.activations > 0
    assert footprint.peak == sum(dataclasses.astuple(footprint))


def test_without_copies_and_padding_the_parts_are_exact():
    config = config_of(64, "precision.dtype=fp32", "parallel.distributed_optimizer=false", "optimizer.name=sgd")
    spec = spec_of(layers=2, hidden=128, vocabulary=1024)
    footprint = traced(config, spec, rollouts_of(64), rank=0, world=1)
    angles = 4 * spec.head_dim // 2
    count = 4 * count_parameters(spec)
    assert (footprint.weights, footprint.gradients) == (count + angles, count)
    assert footprint.teacher_weights == count + angles
    assert footprint.optimizer < 1024  # a few numbers


def test_longrope_is_traced_with_both_sets_of_frequencies():
    factors = (1.0,) * 24
    spec = spec_of(layers=2, hidden=128, vocabulary=1024, rotary_dim=48)
    longrope = dataclasses.replace(spec, rope_scaling=LongRope(factors, factors, 16, 1.0))
    plain, scaled = (traced(config_of(64), of, rollouts_of(64), rank=0, world=1) for of in (spec, longrope))
    assert (scaled.weights - plain.weights, scaled.teacher_weights - plain.teacher_weights) == (4 * 24, 4 * 24)


def test_a_pipeline_keeps_more_micro_batches_than_its_last_rank():
    config = config_of(512, "parallel.pipeline=4", "precision.dtype=bf16")
    spec = spec_of(layers=4, hidden=128, vocabulary=256)
    ranks = [traced(config, spec, rollouts_of(512), rank=rank, world=4, micro_batches=6) for rank in (1, 2)]
    assert ranks[0].activations > 1.2 * ranks[1].activations
    few = traced(config, spec, rollouts_of(512), rank=1, world=4, micro_batches=1)
    assert few.activations < 0.6 * ranks[0].activations
    assert few.targets < ranks[0].targets


def test_chunks_bound_the_logits():
    spec = spec_of(layers=2, hidden=128, vocabulary=32768)

    def activations(chunk):
        overrides = ("loss.output.objective=full_kl", f"loss.output.chunk_tokens={chunk}", "parallel.tensor=2")
        return traced(config_of(256, *overrides), spec, rollouts_of(256), rank=0, world=2).activations

    tokens = 256 - 2 * 8
    assert activations("null") - activations(16) > 2 * (tokens - 16) * 4 * 32768 // 2  # two buffers at least


if __name__ == "__main__":
    print(measure(**json.loads(sys.argv[1])))
