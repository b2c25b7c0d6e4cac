"""The estimate of a step: operations are those that torch counts in a real model, bytes those that Megatron-Core sends
in a real update, and the rest is arithmetic that is done by hand here."""

import dataclasses
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_oprd.config import ParallelConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.layouts import plan_teacher
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning import update_trace
from megatron_oprd.planning.flops import attention_flops, backward_flops, forward_flops, head_flops
from megatron_oprd.planning.memory_formulas import Share, rank_parameters
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.step_time import Hardware, bubble, decode_seconds, estimate_step
from megatron_oprd.planning.traffic import Traffic, backward_traffic, forward_traffic, reach, update_traffic
from tests.helpers.distributed import result_of
from tests.helpers.models import random_hf_model, save
from tests.unit.test_update_trace import config_of, rollouts_of, spec_of, with_experts


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Qwen3Moe", "Llama"])
def test_operations_are_those_of_a_real_model(family, tmp_path):
    """Hugging Face's, which does not skip the half of the scores that is masked; forward and backward."""
    model = random_hf_model(family, attn_implementation="eager", max_position_embeddings=256)
    model.config._experts_implementation = "eager"  # torch counts no grouped products
    spec = read_model_spec(save(model, tmp_path / "hf"))
    tokens = torch.arange(200)[None] % spec.vocab_size
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    masked, head = spec.num_layers * attention_flops(spec, [200]), head_flops(spec, 200)
    assert forward == pytest.approx(forward_flops(spec, spec.num_layers, [200]) + masked + head, rel=0.01)
    backward = backward_flops(spec, spec.num_layers, [200]) - 2.5 * masked + 4 * masked + 2 * head
    assert counter.get_total_flops() == pytest.approx(backward, rel=0.01)


class _Sent(LiveBytes):
    """What a rank sends in an update that is traced, in bytes, by the collectives' own operations."""

    total = 0.0

    def reset_peak(self):
        super().reset_peak()
        _Sent.total = 0.0  # building is over

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            _Sent.total += sent_by(name.split(".")[1], args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def sent_by(name, args):
    """Bytes of one collective on a rank; messages of a few numbers are left out."""
    group = next(torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
    flat = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
    size = max((t.numel() * t.itemsize for t in flat), default=0)
    if size < 2048 or name.startswith("recv"):
        return 0.0
    factor = 1.0 if name == "send" else (group.size() - 1) / group.size()
    return size * factor * (2 if name.startswith("allreduce") else 1)


def sent(config, spec, world, rank):
    return result_of(_sent, config, spec, world, rank)


def _sent(config, spec, world, rank):
    os.environ["WORLD_SIZE"] = str(world)
    update_trace.LiveBytes = _Sent
    planned = plan_teacher(config, spec, spec)
    update_trace.trace_update(config, spec, [planned], rollouts_of(512), rank=rank, world=world, micro_batches=1)
    return _Sent.total


FULL = ("recompute.granularity=full",)
# Model, layout, whether blocks are recomputed, the rank that is looked at.
CASES = {
    "tensor": (spec_of, ("parallel.tensor=2",), (), 1),
    "sequence": (spec_of, ("parallel.tensor=2", "parallel.sequence=true"), (), 0),
    "sequence, recomputed": (spec_of, ("parallel.tensor=2", "parallel.sequence=true"), FULL, 0),
    "context": (spec_of, ("parallel.context=2",), (), 0),
    "experts": (with_experts, ("parallel.expert=2",), (), 1),
    "experts, recomputed": (with_experts, ("parallel.expert=2",), FULL, 0),
    "data": (spec_of, (), (), 0),
    "data, whole optimizer": (spec_of, ("parallel.distributed_optimizer=false",), (), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_are_those_that_megatron_sends(name):
    model, layout, recompute, rank = CASES[name]
    config = config_of(512, "precision.dtype=bf16", *layout, *recompute)
    spec, parallel = model(layers=4, hidden=256, vocabulary=1024), config.parallel
    forward = forward_traffic(spec, parallel, 4, 512, 2)
    parts = [forward] * (3 if recompute else 2) + [backward_traffic(spec, parallel, 4, 512, 2)]  # teacher and student
    share = Share(parallel.tensor, parallel.pipeline, parallel.expert, (4,))
    dense, experts = rank_parameters(spec, share, 0, lm_head=spec.tied_embeddings)
    parts.append(update_traffic(parallel, dense, experts, 2, 2))
    expected = sum(sum(dataclasses.astuple(part)) for part in parts)
    assert sent(config, spec, 2, rank) == pytest.approx(expected, rel=0.04)


def test_a_pipeline_sends_its_rows_over_each_boundary():
    spec = spec_of(layers=4, hidden=256, vocabulary=1024)
    rows = 100 * 256 * 2
    assert forward_traffic(spec, ParallelConfig(pipeline=2), 4, 100, 2).pipeline == rows / 2  # the last rank sends none
    assert forward_traffic(spec, ParallelConfig(pipeline=2, virtual_pipeline=2), 4, 100, 2).pipeline == 3 * rows / 2
    divided = ParallelConfig(pipeline=2, tensor=2, sequence=True)
    assert backward_traffic(spec, divided, 4, 100, 2).pipeline == rows / 4
    assert forward_traffic(spec, ParallelConfig(), 4, 100, 2) == Traffic()


def test_groups_reach_as_far_as_megatron_lays_them():
    assert reach(ParallelConfig(tensor=2, context=2, expert=8, pipeline=2), 64) == {
        "tensor": 2,
        "context": 4,
        "expert": 8,
        "pipeline": 64,
        "data": 32,
        "targets": 64,
    }


def test_a_bubble_is_the_filling_of_a_pipeline():
    assert bubble(ParallelConfig(), 3) == 0
    assert bubble(ParallelConfig(pipeline=4), 12) == 3 / 12
    assert bubble(ParallelConfig(pipeline=4, virtual_pipeline=2), 12) == 3 / 24


def test_a_token_takes_as_long_as_its_weights_and_keys_are_read():
    spec, config = spec_of(layers=4, hidden=256, vocabulary=1024), config_of(100, "precision.dtype=bf16")
    hardware = Hardware(memory_bytes=1e9, memory_share=0.5, block_seconds=0.0)
    dense, _ = rank_parameters(spec, Share(1, 1, 1, (4,)), 0, lm_head=True)
    keys = 2 * 4 * 4 * 64 * 2 * (100 - 80 / 2)  # of each row: blocks, heads, their size, bytes, tokens
    seconds = decode_seconds(config, spec, 8, Lengths(100, 80), hardware)
    assert seconds == pytest.approx((2 * dense + 8 * keys) / 0.5e9)
    slow = dataclasses.replace(hardware, block_seconds=1.0)
    assert decode_seconds(config, spec, 8, Lengths(100, 80), slow) == 4.0


def test_the_parts_of_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    settings = ("rollout.engine=megatron", "data.prompts=[p]", "recompute.granularity=full", "precision.dtype=bf16")
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "teacher.parallel={tensor: 4}")
    config, spec = config_of(256, *settings, *layout), spec_of(layers=4, hidden=256, vocabulary=1024)

    def estimate(config, **hardware):
        planned = [plan_teacher(config, spec, spec)]
        where = {"world": 8, "hardware": Hardware(**hardware)}
        return estimate_step(config, spec, planned, Lengths(128, 64), **where)

    whole = estimate(config)
    costs = {cost.name: cost for cost in whole.costs}
    sequences = [128] * 16
    assert costs["teacher pass"].flops == costs["student forward"].flops == forward_flops(spec, 4, sequences)
    assert costs["student recompute"].flops == costs["student forward"].flops
    assert costs["student backward"].flops == backward_flops(spec, 4, sequences)
    assert costs["teacher rows"].nvlink == 16 * 64 * 4 * 256 * 2 * 2 / 8  # two tensor-parallel ranks read each
    assert whole.student_bubble == 1 / 4 and whole.teacher_bubble == 0
    useful = sum(cost.flops for name, cost in costs.items() if name != "student recompute")
    assert whole.utilisation == pytest.approx(useful / (whole.seconds * 8 * 989e12))
    assert all(cost.network == 0 for cost in whole.costs)  # eight of a node
    apart = {cost.name: cost for cost in estimate(config, gpus_per_node=2).costs}
    assert apart["teacher pass"].network == costs["teacher pass"].nvlink
    assert apart["student forward"].nvlink > 0  # tensor parallelism stays in a node of two
    parallel = config.parallel.model_copy(update={"overlap_grad_reduce": True, "overlap_param_gather": True})
    hidden = {cost.name: cost for cost in estimate(config.model_copy(update={"parallel": parallel})).costs}
    assert hidden["update"].seconds < costs["update"].seconds and hidden["update"].nvlink == costs["update"].nvlink
