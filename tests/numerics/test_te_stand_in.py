"""Megatron-Core's own Transformer Engine modules run on the CPU stand-in and give what its local ones give; FP8 shows
where it is on. tests/unit/test_te_contract.py holds the stand-in to the real package's names."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).resolve().parents[1] / "helpers" / "te_on_cpu"
ROUNDING_FP32 = 1e-5
pytestmark = pytest.mark.skipif(
    importlib.metadata.version("megatron-core") != "0.16.1", reason="the stand-in serves Megatron-Core 0.16.1"
)


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Return the figures of the cases of tests/helpers/te_cases.py on two ranks."""
    folder = tmp_path_factory.mktemp("te")
    result = subprocess.run(
        [sys.executable, "-m", "tests.helpers.te_cases", "2", str(folder)],
        cwd=STAND_IN.parents[2],  # the repository: found after the stand-in
        env={**os.environ, "PYTHONPATH": str(STAND_IN), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads((folder / "figures.json").read_text())


@pytest.mark.parametrize("layout", ["one_rank", "tensor_parallel", "sequence_parallel"])
def test_te_layers_equal_the_local_ones(figures, layout):
    assert figures[layout]["logits"] < ROUNDING_FP32
    assert figures[layout]["gradients"] < ROUNDING_FP32


def test_fp8_is_on_in_all_layers_but_the_outer_ones(figures):
    middle_layers = 2
    assert figures["fp8"]["contexts"] == [["autocast", True, "Float8CurrentScaling", "HYBRID"]] * middle_layers
    assert 1e-3 < figures["fp8"]["logits"] < 0.1
    assert figures["fp8"]["gradients"] > 1e-2


def test_recomputed_layers_compute_in_fp8_too(figures):
    assert (
        figures["recomputed"]["contexts"] == [["autocast", True, "TEDelayedScaling", "E4M3"]] * 2
    )  # around all layers
    assert figures["recomputed"]["logits"] == figures["recomputed"]["gradients"] == 0


def test_fp8_weights_are_those_of_the_last_first_micro_batch(figures):
    assert figures["stale"]["cached"] == 0
    assert figures["stale"]["fresh"] > 0.1


def test_a_frozen_model_holds_fp8_weights(figures):
    teacher = figures["fp8_weights"]
    layers = 4
    assert teacher["contexts"] == [["model_init", False, False]] * layers + [["autocast", False, False]] * layers
    assert teacher["held"] == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    assert teacher["bytes"] == 1
    assert 1e-3 < teacher["rounding"] < 0.05  # three bits after the leading one
    assert 1e-3 < teacher["logits"] < 0.2


def test_grouped_experts_equal_sequential_ones(figures):
    assert figures["experts"]["grouped"] < ROUNDING_FP32
    assert figures["experts"]["grouped_gradients"] < ROUNDING_FP32
    assert 1e-3 < figures["experts"]["fp8"] < 0.3


def test_context_parallel_attention_equals_one_rank(figures):
    assert figures["context_parallel"]["all_ranks"] < ROUNDING_FP32
    assert figures["context_parallel"]["one_rank"] < ROUNDING_FP32
    assert figures["context_parallel"]["gap"] == 0


def test_fused_adam_equals_torch_adam(figures):
    assert figures["optimizer"]["AdamW"] < ROUNDING_FP32
    assert figures["optimizer"]["Adam"] < ROUNDING_FP32


def test_training_in_fp8_resumes_from_a_checkpoint(figures):
    assert figures["training"]["first"] > 1e-3
    assert figures["training"]["second"] > 1e-3
    assert figures["training"]["resumed"] < 1e-6


@pytest.mark.parametrize("name", ["dense", "dense_and_sparse"])
def test_a_stock_te_model_reads_back_what_was_trained_from_its_checkpoint(figures, name):
    distance = figures[f"megatron_lm_{name}"]
    assert distance["read"] < ROUNDING_FP32
    assert distance["trained"] > 1e-3
    assert distance["returned"] < ROUNDING_FP32
    assert distance["returned_from_own"] < ROUNDING_FP32
