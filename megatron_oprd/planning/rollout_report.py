"""The lines of the dry run about rollouts: the step's two halves, the rate of generation, weight sync and horizon."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from megatron_oprd.launch.lengths import Lengths
from megatron_oprd.planning.hardware import H100, Hardware
from megatron_oprd.planning.planned_run import PlannedRun
from megatron_oprd.planning.rollout_time import generators, layer_time, sync_bytes
from megatron_oprd.planning.step_time import Estimate, estimate_step
from megatron_oprd.rollout.horizon import response_limit


def rollout_lines(run: PlannedRun, hardware: Hardware = H100) -> Iterator[str]:
    """Yield the lines. Each figure says whether it is measured or assumed. None for stored responses."""
    config = run.config
    if not config.rollout.generates:
        return
    estimate = estimate_step(run, hardware)
    yield _step(estimate)
    yield _rate(run, estimate)
    if estimate.with_servers:
        size, rate = sync_bytes(run), hardware.sync_bytes
        yield (
            f"Weight sync: {size / 1e9:.2f} GB in {config.precision.dtype} before each step's rollouts; assumed: "
            f"{rate / 1e9:.0f} GB/s"
        )
    if config.rollout.horizon is not None:
        yield _horizon(run, estimate, hardware)


def _step(estimate: Estimate) -> str:
    rollouts, training = estimate.rollout_seconds, estimate.training_seconds
    sync = f"weight sync {estimate.sync_seconds:.1f} s + " if estimate.with_servers else ""
    both = f"rollouts {rollouts:.1f} s + training {training:.1f} s"
    longer = f"the longer of rollouts {rollouts:.1f} s and training {training:.1f} s"
    total = f"A step: {estimate.seconds:.1f} s = {sync}"
    if not estimate.with_servers:
        return f"{total}{both}"
    if estimate.ahead:
        return f"{total}{longer} (rollout.ahead=1)"
    return f"{total}{both}; {estimate.seconds_with(1):.1f} s with rollout.ahead=1, which takes {longer}"


def _rate(run: PlannedRun, estimate: Estimate) -> str:
    models = generators(run)
    seconds = next(cost.seconds for cost in estimate.costs if cost.name == "rollout: tokens")
    rate = run.rollouts_per_step * run.lengths.response / max(seconds, 1e-9)
    who = (
        f"servers: {models.count}, GPUs of each: {models.layout.tensor}"
        if estimate.with_servers
        else (f"replicas: {models.count}")
    )
    line = f"Generation: {rate:,.0f} tokens/s; {who}, rows of each: {models.rows}"
    if run.config.rollout.tokens_per_second is not None:
        return f"{line}; set by rollout.tokens_per_second"
    layer = layer_time(run.config, run.setup.student)
    return f"{line}; at least {layer.seconds * 1e6:,.0f} us for a layer and token, {layer.source}"


def _horizon(run: PlannedRun, estimate: Estimate, hardware: Hardware) -> str:
    config, lengths = run.config, run.lengths

    def seconds(tokens: int) -> float:
        sequence = lengths.sequence - lengths.response + tokens
        longer = min(sequence, run.setup.student.max_position_embeddings)
        planned = dataclasses.replace(run, lengths=Lengths(longer, tokens))
        return estimate_step(planned, hardware).rollout_seconds

    first, most = response_limit(config, 0), config.rollout.max_new_tokens
    grows = f"; {first:,} tokens at first, {seconds(first):.1f} s" if first < lengths.response else ""
    return (
        f"Horizon: {lengths.response:,} tokens, rollouts {estimate.rollout_seconds:.1f} s{grows}; without it "
        f"{most:,} tokens, {seconds(most):.1f} s"
    )
