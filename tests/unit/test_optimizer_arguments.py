"""Check the arguments for mcore's optimizer and Transformer Engine, whose effect needs a GPU."""

import dataclasses
import sys
import types

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import optimizer_config
from megatron.core.transformer import TransformerConfig

from megatron_oprd.config import OptimizerConfig, ParallelConfig, PrecisionConfig
from megatron_oprd.models.tp_overlap import start_tp_overlap, tp_overlap_arguments
from megatron_oprd.training.optimizer_arguments import optimizer_arguments

LEAN = {"use_precision_aware_optimizer", "optimizer_cpu_offload"}


def test_a_plain_optimizer_is_told_nothing_of_states():
    adamw = optimizer_arguments(OptimizerConfig(betas=(0.8, 0.9)), bf16=True, distributed=True)
    assert (adamw["optimizer"], adamw["adam_beta2"], adamw["weight_decay"]) == ("adam", 0.9, 0.01)
    sgd = optimizer_arguments(OptimizerConfig(name="sgd"), bf16=False, distributed=False)
    assert (sgd["optimizer"], sgd["weight_decay"], sgd["params_dtype"]) == ("sgd", 0.0, torch.float32)
    assert not LEAN & (adamw.keys() | sgd.keys())


def test_a_precision_aware_optimizer_keeps_moments_in_bf16_and_reduces_gradients_in_float32():
    arguments = optimizer_arguments(OptimizerConfig(precision_aware=True), bf16=True, distributed=True)
    assert arguments["use_precision_aware_optimizer"] and arguments["use_distributed_optimizer"]
    dtypes = [arguments[f"{name}_dtype"] for name in ("main_grads", "main_params", "exp_avg", "exp_avg_sq")]
    assert dtypes == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16]
    assert arguments["store_param_remainders"]
    assert arguments.keys() <= {field.name for field in dataclasses.fields(MegatronOptimizerConfig)}


def test_a_share_of_the_state_goes_to_cpu_memory(monkeypatch):
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda version: True)
    arguments = optimizer_arguments(OptimizerConfig(cpu_offload=0.25), bf16=True, distributed=True)
    config = MegatronOptimizerConfig(**arguments)  # mcore's own checks
    assert config.optimizer_cpu_offload and config.optimizer_offload_fraction == 0.25
    assert config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
    assert (config.exp_avg_dtype, config.exp_avg_sq_dtype) == (torch.float32, torch.float32)


PARALLEL = ParallelConfig(tensor=4, sequence=True, tp_comm_overlap=True)


def test_mcore_is_told_of_an_overlap_that_is_asked_for():
    assert tp_overlap_arguments(ParallelConfig(tensor=4, sequence=True)) == {}
    assert tp_overlap_arguments(PARALLEL).keys() <= {field.name for field in dataclasses.fields(TransformerConfig)}
    assert tp_overlap_arguments(PARALLEL)["tp_comm_overlap"] is True


@pytest.mark.parametrize(
    ("precision", "modes"),
    [
        ({}, ["none"]),
        ({"fp8": "hybrid"}, ["fp8", "none"]),
        ({"fp8": "hybrid", "keep_bf16": {"first": 0, "last": 1}}, ["fp8", "none"]),
        ({"fp8": "hybrid", "keep_bf16": {"first": 0, "last": 0}}, ["fp8"]),
    ],
)
def test_buffers_are_as_wide_as_a_forward_and_of_every_kind_that_blocks_use(precision, modes, monkeypatch):
    calls = []
    kinds = types.SimpleNamespace(FP8="fp8", NONE="none")
    base = types.SimpleNamespace(UserBufferQuantizationMode=kinds, initialize_ub=lambda **given: calls.append(given))
    pytorch = types.ModuleType("transformer_engine.pytorch")
    pytorch.module = types.SimpleNamespace(base=base)
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", pytorch)
    start_tp_overlap(PARALLEL, PrecisionConfig(**precision), tokens=4096, hidden_size=64)
    assert calls == [
        {
            "shape": [4096, 64],
            "tp_size": 4,
            "quantization_modes": modes,
            "ub_cfgs": {},
            "bootstrap_backend": "nccl",
        }
    ]
