"""Estimate of the time in which rollouts are generated, by the student or by servers.

docs/scaling.md has every formula. All functions are pure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_oprd.config import Config, ParallelConfig
from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.build import DTYPES
from megatron_oprd.models.layer_plan import even_stages
from megatron_oprd.planning.delta_net_costs import MOVED_FORWARD, moved_bytes
from megatron_oprd.planning.device_formulas import BYTES
from megatron_oprd.planning.flops import forward_flops, head_flops
from megatron_oprd.planning.hardware import Cost, Hardware, Links
from megatron_oprd.planning.parameter_counts import ModelDivision, rank_parameters
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_memory import rollouts_of_replica
from megatron_oprd.planning.traffic import Traffic, forward_traffic
from megatron_oprd.rollout.batch_rows import MAX_ROWS
from megatron_oprd.rollout.weight_sync import weight_bytes

WEIGHT_SYNC = "weight sync"  # name of a cost; those of rollouts begin with ROLLOUT
ROLLOUT = "rollout: "


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer in a decode step that does not depend on the number of rows: its kernels are launched."""

    seconds: float
    source: str  # a measurement with its conditions, or an assumption


CAPTURED = LayerTime(
    3.5e-3 / 28, "measured with CUDA graphs: 3.5 ms a token of 64 rows, 28 layers, 1.5B, one H100 (results/rollouts.md)"
)
NOT_CAPTURED = LayerTime(  # layers with experts
    64 / 2059 / 28, "measured without CUDA graphs: 2,059 tokens/s, 64 rows, 28 layers, 1.5B, one H100 (results/gpu.md)"
)
OF_VLLM = LayerTime(1e-4, "assumed")


def layer_time(config: Config, spec: ModelSpec) -> LayerTime:
    """Return the least time of a layer in a decode step of the engine of `config.rollout`."""
    if config.rollout.engine == "vllm":
        return OF_VLLM
    return NOT_CAPTURED if spec.num_experts else CAPTURED


@dataclass(frozen=True)
class Generators:
    """The models that generate the rollouts of a step: replicas of the student, or servers."""

    layout: ParallelConfig  # of each model
    count: int
    rows: int  # rollouts that a model generates at once
    rounds: int  # how often a model fills its rows

    @property
    def devices(self) -> int:
        """Return the number of devices of all models."""
        return self.count * self.layout.tensor * self.layout.pipeline


def generators(run: PlannedRun) -> Generators:
    """Return the models that generate. The addresses of servers count as servers of `rollout.server.tensor` GPUs."""
    config, parallel, server = run.config, run.config.parallel, run.config.rollout.server
    if config.rollout.engine == "vllm":
        layout = ParallelConfig(tensor=server.tensor, expert=server.tensor if run.setup.student.num_experts else 1)
        count, most = max(len(server.addresses), 1), server.max_running
        rollouts = math.ceil(run.rollouts_per_step / count)
    else:
        layout = parallel.model_copy(update={"context": 1, "sequence": False})  # in which the engine runs the model
        count, most = run.setup.world_size // (parallel.tensor * parallel.pipeline), MAX_ROWS
        rollouts = rollouts_of_replica(run)
    rounds = math.ceil(rollouts / most)
    return Generators(layout, count, math.ceil(rollouts / rounds), rounds)


def rollout_costs(run: PlannedRun, links: Links) -> list[Cost]:
    """Return the costs of prefill, of decoding and of bringing the weights to servers; none for stored responses."""
    config, spec, lengths, rollouts = run.config, run.setup.student, run.lengths, run.rollouts_per_step
    if not config.rollout.generates:
        return []
    models, size, prompt = generators(run), BYTES[config.precision.dtype], lengths.sequence - lengths.response
    layout, rows = models.layout, models.rows * models.rounds
    prefill_flops = forward_flops(spec, spec.num_layers, [prompt] * rollouts)
    moved = moved_bytes(spec, spec.num_layers, prompt * rollouts, MOVED_FORWARD) / links.hardware.memory_rate()
    prefill_seconds = (prefill_flops / links.hardware.flops_rate(spec, in_fp8=False) + moved) / models.devices
    prefill_traffic = forward_traffic(spec, layout, spec.num_layers, rows * prompt, size)
    decode_flops = forward_flops(spec, spec.num_layers, [lengths.sequence] * rollouts) - prefill_flops
    decode_flops += head_flops(spec, rollouts * lengths.response)
    generating = config.model_copy(update={"parallel": layout})
    layer_seconds = links.hardware.layer_seconds or layer_time(config, spec).seconds
    step_seconds = decode_seconds(generating, spec, models.rows, lengths, links.hardware, layer_seconds)
    seconds = models.rounds * lengths.response * step_seconds
    decode_traffic = forward_traffic(spec, layout, spec.num_layers, rows * lengths.response, size)
    prompts = links.cost(f"{ROLLOUT}prompts", prefill_flops, prefill_seconds * layout.pipeline, prefill_traffic, layout)
    tokens = links.cost(f"{ROLLOUT}tokens", decode_flops, seconds, decode_traffic, layout)
    if config.rollout.tokens_per_second is not None:
        seconds = rollouts * lengths.response / config.rollout.tokens_per_second
        tokens = links.cost(f"{ROLLOUT}tokens", decode_flops, seconds, decode_traffic, layout, overlaps=True)
    sync = sync_bytes(run)
    if not sync:
        return [prompts, tokens]
    return [links.cost(WEIGHT_SYNC, 0, sync / links.hardware.sync_bytes, Traffic(), layout), prompts, tokens]


def sync_bytes(run: PlannedRun) -> int:
    """Return the bytes of the exported weights, which every server reads before a step; 0 without servers."""
    if run.config.rollout.engine != "vllm":
        return 0
    return weight_bytes(run.setup.student, DTYPES[run.config.precision.dtype])


def divide(spec: ModelSpec, layout: ParallelConfig) -> ModelDivision:
    """Return how the parameters of a model with equally many layers on each stage are divided over the ranks."""
    stages = even_stages(spec.num_layers, layout.pipeline, layout.virtual_pipeline or 1)
    return ModelDivision(layout.tensor, layout.pipeline, layout.expert, stages)


def decode_seconds(
    config: Config, spec: ModelSpec, rows: int, lengths: Lengths, hardware: Hardware, layer_seconds: float
) -> float:
    """Return the seconds in which a model generates one token for each of `rows` sequences.

    This is the time to read the weights and the KV cache, and to read and write the states of Gated DeltaNet, or
    `layer_seconds` for each layer if that takes longer. The average cache has the longest prompt and half of the
    longest response. Pipeline stages work one after the other.
    """
    parallel, size = config.parallel, BYTES[config.precision.dtype]
    dense, experts = rank_parameters(spec, divide(spec, parallel), 0, lm_head=True)
    used_experts = 0.0  # share of the experts that at least one row is sent to
    if spec.num_experts:
        used_experts = 1 - (1 - spec.experts_per_token / spec.num_experts) ** (rows * parallel.expert)
    cached_tokens = lengths.sequence - lengths.response / 2
    groups = spec.num_query_groups / parallel.tensor
    with_cache = spec.num_layers - len(spec.linear_layers)
    keys_and_values = 2 * with_cache / parallel.pipeline * groups * spec.head_dim * size * cached_tokens
    states = 0.0
    if spec.delta_net is not None:
        divided = parallel.pipeline * parallel.tensor
        states = 2 * len(spec.linear_layers) * BYTES["fp32"] * spec.delta_net.state_size / divided
    bytes_moved = (dense + experts * used_experts) * size + rows * (keys_and_values + states)
    seconds = bytes_moved / hardware.memory_rate()
    return parallel.pipeline * max(seconds, layer_seconds * spec.num_layers / parallel.pipeline)
