"""The estimate of a step: torch counts the operations of real models, Megatron-Core sends the bytes of a traced update,
and the rest is computed by hand here."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from megatron_oprd.config import ParallelConfig
from megatron_oprd.config.rollouts import RolloutHorizonConfig
from megatron_oprd.hf.config import read_model_spec
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning import update_trace
from megatron_oprd.planning.flops import attention_flops, backward_flops, forward_flops, head_flops
from megatron_oprd.planning.hardware import Hardware
from megatron_oprd.planning.memory_trace import LiveBytes
from megatron_oprd.planning.parameter_counts import ModelDivision, rank_parameters
from megatron_oprd.planning.rollout_report import rollout_lines
from megatron_oprd.planning.rollout_time import decode_seconds, generators, sync_bytes
from megatron_oprd.planning.step_time import bubble, estimate_step
from megatron_oprd.planning.traffic import Traffic, backward_traffic, forward_traffic, group_spans, update_traffic
from megatron_oprd.testing.distributed import result_of
from megatron_oprd.testing.models import random_hf_model, save
from tests.helpers.planning import (
    dense_spec,
    expert_spec,
    filling_rollouts,
    hybrid_spec,
    planned_run,
    replay_config,
    shared_expert_spec,
)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Qwen2Moe", "Llama", "Qwen3Next"])
def test_operations_agree_with_torchs_counter(family, tmp_path):
    """Forward and backward of a Hugging Face model, which also computes the masked half of the scores."""
    model = random_hf_model(family, attn_implementation="eager", max_position_embeddings=256)
    model.config._experts_implementation = "eager"  # torch does not count grouped products
    spec = read_model_spec(save(model, tmp_path / "hf"))
    tokens = torch.arange(200)[None] % spec.vocab_size
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=tokens, use_cache=False).logits
    forward = operations_of_products(counter)
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    layers = spec.num_layers - len(spec.linear_layers)
    masked, head = layers * attention_flops(spec, [200]), head_flops(spec, 200)
    solves, convolutions = not_counted(spec)
    expected = forward_flops(spec, spec.num_layers, [200]) - solves - convolutions
    assert forward == pytest.approx(expected + masked + head, rel=0.01)
    # Each system is solved for the gradients too, which is not counted; their product with the solution is.
    backward = backward_flops(spec, spec.num_layers, [200]) - 2 * convolutions - 2.5 * masked + 4 * masked + 2 * head
    assert operations_of_products(counter) == pytest.approx(backward, rel=0.01)


def operations_of_products(counter):
    """Return the counted operations without convolutions, whose backward torch counts as if they had one group."""
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operation, count in counts.items() if "convolution" not in str(operation))


def not_counted(spec):
    """Return the operations of triangular systems, which torch does not count, and convolutions: 4 chunks of 64."""
    if spec.delta_net is None:
        return 0, 0
    sizes, layers = spec.delta_net, len(spec.linear_layers)
    solves = layers * 4 * 64 * sizes.num_value_heads * 64 * (sizes.key_dim + sizes.value_dim)
    return solves, layers * 200 * 2 * sizes.kernel * sizes.num_key_heads * sizes.convolved


class _SentBytes(LiveBytes):
    """Count the bytes that a rank sends in a traced update, from the operations of its collectives."""

    total = 0.0
    begun = False

    def reset_peak(self):
        super().reset_peak()
        if not self.begun:
            _SentBytes.total, self.begun = 0.0, True  # the models are built, the update begins

    def repeat(self, key, call):
        return call()  # every layer sends its bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            _SentBytes.total += bytes_of_collective(name.split(".")[1], args)
        return super().__torch_dispatch__(func, types, args, kwargs)


def bytes_of_collective(name, args):
    """Return the bytes that a rank sends in one collective. Messages of a few numbers count as zero."""
    group = next(torch.distributed.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
    values = [value for arg in args for value in (arg if isinstance(arg, list) else [arg])]
    size = max((one.numel() * one.itemsize for one in values if isinstance(one, torch.Tensor)), default=0)
    if size < 2048 or name.startswith("recv"):
        return 0.0
    factor = 1.0 if name == "send" else (group.size() - 1) / group.size()
    return size * factor * (2 if name.startswith("allreduce") else 1)


def _trace_sent_bytes(run, rank):
    update_trace.LiveBytes = _SentBytes
    update_trace.trace_update(run, filling_rollouts(512), rank=rank)
    return _SentBytes.total


FULL = ("recompute.granularity=full",)
# Model, layout, recomputation, rank.
CASES = {
    "tensor": (dense_spec, ("parallel.tensor=2",), (), 1),
    "sequence": (dense_spec, ("parallel.tensor=2", "parallel.sequence=true"), (), 0),
    "sequence, recomputed": (dense_spec, ("parallel.tensor=2", "parallel.sequence=true"), FULL, 0),
    "context": (dense_spec, ("parallel.context=2",), (), 0),
    "a shared expert": (
        shared_expert_spec,
        ("parallel.tensor=2", "parallel.sequence=true", "parallel.expert=2"),
        (),
        1,
    ),
    "Gated DeltaNet, context": (hybrid_spec, ("parallel.context=2",), (), 0),
    "experts, recomputed": (expert_spec, ("parallel.expert=2",), FULL, 0),
    "data": (dense_spec, (), (), 0),
    "data, undivided optimizer": (dense_spec, ("parallel.distributed_optimizer=false",), (), 1),
}


@pytest.mark.parametrize("name", CASES)
def test_bytes_agree_with_megatrons_collectives(name):
    model, layout, recompute, rank = CASES[name]
    config = replay_config(512, "precision.dtype=bf16", *layout, *recompute)
    spec, parallel = model(layers=4, hidden=256, vocabulary=1024), config.parallel
    forward = forward_traffic(spec, parallel, 4, 512, 2)
    parts = [forward] * (3 if recompute else 2) + [backward_traffic(spec, parallel, 4, 512, 2)]  # teacher and student
    division = ModelDivision(parallel.tensor, parallel.pipeline, parallel.expert, (4,))
    parameters = rank_parameters(spec, division, 0, lm_head=spec.tied_embeddings)
    parts.append(update_traffic(parallel, parameters, 2, 2))
    expected = sum(sum(dataclasses.astuple(part)) for part in parts)
    sent = result_of(_trace_sent_bytes, planned_run(config, spec, 2), rank)
    assert sent == pytest.approx(expected, rel=0.04)


def test_a_pipeline_sends_its_rows_over_each_boundary():
    spec = dense_spec(layers=4, hidden=256, vocabulary=1024)
    rows = 100 * 256 * 2
    assert forward_traffic(spec, ParallelConfig(pipeline=2), 4, 100, 2).pipeline == rows / 2  # the last rank sends none
    assert forward_traffic(spec, ParallelConfig(pipeline=2, virtual_pipeline=2), 4, 100, 2).pipeline == 3 * rows / 2
    divided = ParallelConfig(pipeline=2, tensor=2, sequence=True)
    assert backward_traffic(spec, divided, 4, 100, 2).pipeline == rows / 4
    assert forward_traffic(spec, ParallelConfig(), 4, 100, 2) == Traffic()


def test_groups_span_the_ranks_that_megatron_gives_them():
    assert group_spans(ParallelConfig(tensor=2, context=2, expert=8, pipeline=2), 64) == {
        "tensor": 2,
        "context": 4,
        "expert": 8,
        "pipeline": 64,
        "data": 32,
        "targets": 64,
    }


def test_the_bubble_is_the_time_to_fill_the_pipeline():
    assert bubble(ParallelConfig(), 3) == 0
    assert bubble(ParallelConfig(pipeline=4), 12) == 3 / 12
    assert bubble(ParallelConfig(pipeline=4, virtual_pipeline=2), 12) == 3 / 24


def test_a_token_takes_as_long_as_reading_weights_and_kv_cache():
    spec, config = dense_spec(layers=4, hidden=256, vocabulary=1024), replay_config(100, "precision.dtype=bf16")
    hardware = Hardware(memory_bytes=1e9, memory_share=0.5)
    dense, _ = rank_parameters(spec, ModelDivision(1, 1, 1, (4,)), 0, lm_head=True)
    keys = 2 * 4 * 4 * 64 * 2 * (100 - 80 / 2)  # per row: keys and values, layers, heads, width, bytes, tokens
    seconds = decode_seconds(config, spec, 8, Lengths(100, 80), hardware, 0.0)
    assert seconds == pytest.approx((2 * dense + 8 * keys) / 0.5e9)
    assert decode_seconds(config, spec, 8, Lengths(100, 80), hardware, 1.0) == 4.0


def test_a_token_reads_and_writes_the_states_of_gated_deltanet():
    spec, config = hybrid_spec(layers=4, hidden=256, vocabulary=1024), replay_config(100, "precision.dtype=bf16")
    hardware = Hardware(memory_bytes=1e9, memory_share=1.0)
    dense, _ = rank_parameters(spec, ModelDivision(1, 1, 1, (4,)), 0, lm_head=True)
    keys = 2 * 1 * 4 * 64 * 2 * (100 - 80 / 2)  # the fourth layer alone has attention
    states = 2 * 3 * 8 * 32 * 32 * 4  # read and written, layers, heads, key and value width, bytes
    seconds = decode_seconds(config, spec, 8, Lengths(100, 80), hardware, 0.0)
    assert seconds == pytest.approx((2 * dense + 8 * (keys + states)) / 1e9)


def test_gated_deltanet_adds_the_time_in_which_plain_torch_moves_its_numbers():
    config, spec = replay_config(256, "precision.dtype=bf16"), hybrid_spec(layers=4, hidden=256, vocabulary=1024)
    rates = {"matrix_share": 1.0, "memory_share": 1.0, "bf16_flops": 1e12, "memory_bytes": 1e9}
    costs = {cost.name: cost for cost in estimate_step(planned_run(config, spec), Hardware(**rates)).costs}
    stored = 20 * 4 * 32 + 8 * (50 * 32 + 40 * 32 + 22 * 64 + 5 * 32 * 32 / 64)
    for name, moved in (("teacher pass", 4.6), ("student forward", 4.6), ("student backward", 8.4)):
        seconds = costs[name].flops / 1e12 + 3 * 16 * 128 * moved * stored / 1e9
        assert costs[name].seconds == pytest.approx(seconds, rel=1e-9)


def test_the_parts_of_a_step_follow_the_formulas():
    settings = ("rollout.engine=megatron", "data.prompts=[p]", "recompute.granularity=full", "precision.dtype=bf16")
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "teacher.parallel={tensor: 4}")
    config, spec = replay_config(256, *settings, *layout), dense_spec(layers=4, hidden=256, vocabulary=1024)

    def estimate(config, **hardware):
        return estimate_step(planned_run(config, spec, 8, lengths=Lengths(128, 64)), Hardware(**hardware))

    step = estimate(config)
    costs = {cost.name: cost for cost in step.costs}
    sequences = [128] * 16
    assert costs["teacher pass"].flops == costs["student forward"].flops == forward_flops(spec, 4, sequences)
    assert costs["student recompute"].flops == costs["student forward"].flops
    assert costs["student backward"].flops == backward_flops(spec, 4, sequences)
    assert costs["teacher rows"].nvlink == 16 * 64 * 4 * 256 * 2 * 2 / 8  # two tensor-parallel ranks need each row
    assert step.student_bubble == 1 / 4 and step.teacher_bubble == 0
    useful = sum(cost.flops for name, cost in costs.items() if name != "student recompute")
    assert step.utilisation == pytest.approx(useful / (step.seconds * 8 * 989e12))
    assert all(cost.network == 0 for cost in step.costs)  # eight ranks of one node
    small_nodes = {cost.name: cost for cost in estimate(config, gpus_per_node=2).costs}
    assert small_nodes["teacher pass"].network == costs["teacher pass"].nvlink
    assert small_nodes["student forward"].nvlink > 0  # tensor parallelism stays in a node of two
    parallel = config.parallel.model_copy(update={"overlap_grad_reduce": True, "overlap_param_gather": True})
    overlapped = {cost.name: cost for cost in estimate(config.model_copy(update={"parallel": parallel})).costs}
    assert overlapped["update"].seconds < costs["update"].seconds
    assert overlapped["update"].nvlink == costs["update"].nvlink


GENERATION = ("rollout.engine=megatron", "data.prompts=[p]", "rollout.max_new_tokens=64", "precision.dtype=bf16")
SERVERS = (*GENERATION, "rollout.engine=vllm", "rollout.server.addresses=[a:1,b:2]", "rollout.server.max_running=3")


def estimate_of(*settings, world=8):
    run = planned_run(replay_config(256, *settings), dense_spec(layers=4, hidden=256, vocabulary=1024), world)
    return run, estimate_step(run)


def seconds_by_name(estimate):
    return {cost.name: cost.seconds for cost in estimate.costs}


def test_a_set_rate_replaces_the_estimated_one():
    """Eight prompts with two samples of 64 tokens."""
    _, estimate = estimate_of(*GENERATION, "rollout.tokens_per_second=32")
    assert seconds_by_name(estimate)["rollout: tokens"] == 16 * 64 / 32


def test_the_student_generates_at_the_measured_time_of_a_layer():
    run, estimate = estimate_of(*GENERATION, "rollout.samples_per_prompt=300")  # 300 rollouts of a replica
    assert (generators(run).rows, generators(run).rounds) == (150, 2)
    assert seconds_by_name(estimate)["rollout: tokens"] == pytest.approx(2 * 64 * 4 * 3.5e-3 / 28)
    text = " ".join(rollout_lines(run))
    assert "replicas: 8, rows of each: 150; at least 125 us for a layer and token, measured" in text


def test_servers_generate_in_rounds_and_get_the_exported_weights(tmp_path):
    run, estimate = estimate_of(*SERVERS)
    models = generators(run)  # 16 rollouts on two servers that run at most three at once
    assert (models.count, models.devices, models.rows, models.rounds) == (2, 2, 3, 3)
    assert seconds_by_name(estimate)["rollout: tokens"] == pytest.approx(3 * 64 * 4 * 1e-4)
    model = random_hf_model("Qwen3", tie_word_embeddings=True)
    spec = read_model_spec(save(model, tmp_path / "hf"))
    exported = sum(
        tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / "hf/model.safetensors").values()
    )
    run = dataclasses.replace(run, setup=dataclasses.replace(run.setup, student=spec))
    assert sync_bytes(run) == exported / 2  # saved in float32, sent in bfloat16


def test_one_update_ahead_hides_the_shorter_half_of_a_step():
    _, beside = estimate_of(*SERVERS, "rollout.ahead=1")
    run, after = estimate_of(*SERVERS)
    rollouts, training, sync = after.rollout_seconds, after.training_seconds, after.sync_seconds
    assert min(rollouts, training, sync) > 0
    assert sum(cost.seconds for cost in after.costs) == pytest.approx(rollouts + training + sync)
    assert after.seconds == rollouts + training + sync
    assert beside.seconds == after.seconds_with(1) == sync + max(rollouts, training)
    _, own = estimate_of(*GENERATION, "rollout.ahead=1")  # the student cannot generate while it trains
    assert own.seconds == own.rollout_seconds + own.training_seconds
    assert f"{after.seconds_with(1):.1f} s with rollout.ahead=1" in next(rollout_lines(run))


def test_the_lines_compare_rollouts_with_and_without_the_horizon():
    first = ("loss.representation.positions=first_k", "loss.representation.k=16", "rollout.tokens_per_second=32")
    run, _ = estimate_of(*GENERATION, *first, "rollout.horizon=auto")
    run = dataclasses.replace(run, lengths=Lengths(80, 16, 80))
    assert list(rollout_lines(run))[-1] == "Horizon: 16 tokens, rollouts 8.0 s; without it 64 tokens, 32.0 s"
    grown = run.config.rollout.model_copy(update={"horizon": RolloutHorizonConfig(start=8, grow=8, every=1)})
    run = dataclasses.replace(run, config=run.config.model_copy(update={"rollout": grown}))
    line = "Horizon: 16 tokens, rollouts 8.0 s; 8 tokens at first, 4.0 s; without it 64 tokens, 32.0 s"
    assert list(rollout_lines(run))[-1] == line
