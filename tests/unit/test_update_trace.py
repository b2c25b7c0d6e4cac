"""The memory trace of an update agrees with real updates and with formulas."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from megatron_oprd.hf.names import count_parameters
from megatron_oprd.model_spec import LongRope
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.models.precision import ModelPrecision, Precision
from megatron_oprd.parallel.topology import start_process
from megatron_oprd.planning.megatron_patches import Patch, patched, tracing_patches
from megatron_oprd.planning.memory_formulas import predict_memory
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.parameter_counts import ModelDivision, rank_parameters
from megatron_oprd.runtime import platform
from megatron_oprd.testing.random_update import build_random_update
from tests.helpers.memory import HONEST
from tests.helpers.planning import (
    dense_spec,
    expert_spec,
    filling_rollouts,
    hybrid_spec,
    peaks_of_two_traces,
    planned_run,
    replay_config,
    trace_in_process,
)

DEVICE = torch.device("cpu")
FULL = ("recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1")
SPECS = {"dense": dense_spec, "experts": expert_spec, "hybrid": hybrid_spec}


def measure(tokens, kind, sizes, overrides):
    """Return the peak of the second update of a real process, minus the memory that it has without models."""
    start_process(DEVICE)
    update(64, SPECS[kind](layers=1, hidden=128, vocabulary=256), overrides)  # libraries that first operations load
    gc.collect()
    before = psutil.Process().memory_info().rss
    update(tokens, SPECS[kind](**sizes), overrides)
    return platform.peak_memory_bytes(DEVICE) - before


def update(tokens, spec, overrides):
    """Run two updates and reset the peak before each."""
    random_update = build_random_update(replay_config(tokens, *overrides), spec, filling_rollouts(tokens), DEVICE)
    for _ in range(2):
        platform.reset_peak_memory(DEVICE)
        random_update.run()


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("dense", ("precision.dtype=fp32",)),
        pytest.param("dense", ("precision.dtype=bf16", *FULL), marks=pytest.mark.nightly),
        pytest.param("experts", ("precision.dtype=fp32",), marks=pytest.mark.nightly),
        pytest.param("experts", ("precision.dtype=bf16", *FULL), marks=pytest.mark.nightly),
        pytest.param("hybrid", ("precision.dtype=fp32",), marks=pytest.mark.nightly),
        pytest.param("hybrid", ("precision.dtype=bf16", *FULL), marks=pytest.mark.nightly),
    ],
)
def test_the_traced_peak_is_the_peak_of_a_real_update(kind, overrides):
    """A random router prefers some experts, but all experts together need as much memory as balanced ones."""
    sizes = {"layers": 4, "hidden": 512, "vocabulary": 8192}
    case = {"tokens": 2048, "kind": kind, "sizes": sizes, "overrides": overrides}
    command = [sys.executable, "-m", "tests.unit.test_update_trace", json.dumps(case)]
    environment = {**os.environ, **HONEST, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    run = planned_run(replay_config(2048, *overrides), SPECS[kind](**sizes))
    predicted = trace_in_process(run, filling_rollouts(2048))
    assert predicted.peak == pytest.approx(int(output.split()[-1]), rel=0.1)


LAYOUTS = {  # processes, layout, rank
    "one process": (1, (), 0),
    "tensor": (2, ("parallel.tensor=2",), 1),
    "sequence": (2, ("parallel.tensor=2", "parallel.sequence=true"), 0),
    "context": (2, ("parallel.context=2",), 1),
    "first rank of a pipeline": (2, ("parallel.pipeline=2",), 0),
    "last rank of a pipeline": (2, ("parallel.pipeline=2",), 1),
    "virtual pipeline": (2, ("parallel.pipeline=2", "parallel.virtual_pipeline=2"), 1),
    "all": (16, ("parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.context=2"), 11),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_gradients_and_optimizer_state_follow_the_formulas(layout):
    world_size, overrides, rank = LAYOUTS[layout]
    config = replay_config(256, "precision.dtype=bf16", *overrides)
    parallel, spec = config.parallel, dense_spec(layers=5, hidden=128, vocabulary=1024)
    stages = even_stages(5, parallel.pipeline, parallel.virtual_pipeline or 1)
    division = ModelDivision(parallel.tensor, parallel.pipeline, 1, stages)
    pipeline_rank = rank // (world_size // parallel.pipeline)
    trained, _ = rank_parameters(spec, division, pipeline_rank, lm_head=True)
    run = planned_run(config, spec, world_size)
    footprint = trace_in_process(run, filling_rollouts(256), rank=rank, micro_batches=3)
    assert footprint.weights == pytest.approx(2 * trained, rel=0.01)
    assert footprint.gradients == pytest.approx(4 * trained, rel=0.01)
    copies = world_size // (parallel.tensor * parallel.pipeline)
    assert footprint.optimizer == pytest.approx(12 * trained / copies, rel=0.01)
    assert footprint.targets > 0 and footprint.activations > 0
    assert footprint.peak == sum(dataclasses.astuple(footprint))


def test_an_undivided_fp32_run_follows_the_formulas_to_the_byte():
    config = replay_config(64, "precision.dtype=fp32", "parallel.distributed_optimizer=false", "optimizer.name=sgd")
    spec = dense_spec(layers=2, hidden=128, vocabulary=1024)
    footprint = trace_in_process(planned_run(config, spec), filling_rollouts(64))
    rotary = 4 * spec.head_dim // 2
    weights = 4 * count_parameters(spec)
    assert (footprint.weights, footprint.gradients) == (weights + rotary, weights)
    assert footprint.teacher_weights == weights + rotary
    assert footprint.optimizer < 1024  # a few numbers


@pytest.mark.parametrize("kind", SPECS)
def test_a_trace_leaves_nothing_behind(kind):
    run = planned_run(replay_config(64), SPECS[kind](layers=2, hidden=128, vocabulary=1024))
    first, second = peaks_of_two_traces(run, filling_rollouts(64))
    assert abs(first - second) <= 8  # Megatron-Core's class for experts keeps one scalar


def test_longrope_adds_a_second_set_of_frequencies():
    factors = (1.0,) * 24
    spec = dense_spec(layers=2, hidden=128, vocabulary=1024, rotary_dim=48)
    longrope = dataclasses.replace(spec, rope_scaling=LongRope(factors, factors, 16, 1.0))
    plain, scaled = (
        trace_in_process(planned_run(replay_config(64), one), filling_rollouts(64)) for one in (spec, longrope)
    )
    assert (scaled.weights - plain.weights, scaled.teacher_weights - plain.teacher_weights) == (4 * 24, 4 * 24)


def test_earlier_pipeline_ranks_have_more_micro_batches_in_memory():
    config = replay_config(512, "parallel.pipeline=4", "precision.dtype=bf16")
    run = planned_run(config, dense_spec(layers=4, hidden=128, vocabulary=256), 4)
    earlier, later = (trace_in_process(run, filling_rollouts(512), rank=rank, micro_batches=6) for rank in (1, 2))
    assert earlier.activations > 1.2 * later.activations
    few = trace_in_process(run, filling_rollouts(512), rank=1, micro_batches=1)
    assert few.activations < 0.6 * earlier.activations
    assert few.targets < earlier.targets


GPU = Path(__file__).parents[2] / "docs" / "results" / "gpu.json"
MEASURED = {  # on a GPU with Transformer Engine; blocks, width, MLP, heads, groups, tokens, recomputation, part
    "blocks": (4, 3584, 18944, 28, 4, 8192, "none", "blocks, forward and backward"),
    "student": (28, 1536, 8960, 12, 2, 16384, "full", "student update"),
}


@pytest.mark.parametrize("name", ["blocks", pytest.param("student", marks=pytest.mark.nightly)])
def test_memory_with_transformer_engine_is_what_a_gpu_measured(name):
    layers, hidden, width, heads, groups, tokens, granularity, part = MEASURED[name]
    rows = [row for run in json.loads(GPU.read_text()) for row in run["rows"]]
    measured = next(row for row in rows if (row["part"], row["name"]) == (part, "bf16, Transformer Engine"))
    sizes = dict(layers=layers, hidden=hidden, vocabulary=1024, ffn_hidden_size=width, num_query_groups=groups)
    spec = dense_spec(**sizes, num_attention_heads=heads, head_dim=128, rotary_dim=128)
    config = replay_config(tokens, f"recompute.granularity={granularity}", "loss.representation.k=2000")
    run = planned_run(config, spec)
    fused = ModelPrecision(transformer_engine=True)
    run = dataclasses.replace(run, setup=dataclasses.replace(run.setup, precision=Precision(fused, fused)))
    predicted = trace_in_process(run, filling_rollouts(tokens, 1))
    assert predicted.activations == pytest.approx(measured["step_peak"], rel=0.1)


def test_an_average_of_the_weights_adds_four_bytes_a_parameter_shared_by_the_ranks():
    spec, settings = dense_spec(layers=2, hidden=128, vocabulary=256), ("teacher.ema=0.9", "loss.flow.weight=1.0")
    run, parameters = planned_run(replay_config(64, *settings), spec, 2), count_parameters(spec)
    traced = trace_in_process(run, filling_rollouts(64)).teacher_weights
    assert traced == pytest.approx((2 + 4 / 2) * parameters, rel=0.01)
    assert predict_memory(run)["teacher weights"] == pytest.approx(traced, rel=0.01)


def test_chunks_bound_the_memory_of_the_logits():
    spec = dense_spec(layers=2, hidden=128, vocabulary=32768)

    def activations(chunk):
        overrides = ("loss.output.objective=full_kl", f"loss.output.chunk_tokens={chunk}", "parallel.tensor=2")
        run = planned_run(replay_config(256, *overrides), spec, 2)
        return trace_in_process(run, filling_rollouts(256)).activations

    tokens = 256 - 2 * 8
    assert activations("null") - activations(16) > 2 * (tokens - 16) * 4 * 32768 // 2  # two buffers at least


def test_patches_are_undone_after_an_error():
    patches = tracing_patches(LiveBytes())
    before = [vars(patch.owner)[patch.name] for patch in patches]
    with pytest.raises(ValueError), patched(patches):
        assert [vars(patch.owner)[patch.name] for patch in patches] == [patch.replacement for patch in patches]
        raise ValueError
    assert [vars(patch.owner)[patch.name] for patch in patches] == before


def test_a_patch_of_an_unknown_attribute_fails():
    with pytest.raises(KeyError), patched([Patch(torch.nn.Module, "renamed", None, "")]):
        pass


if __name__ == "__main__":
    print(measure(**json.loads(sys.argv[1])))
