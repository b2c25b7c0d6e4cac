"""Rates of a device, from a data sheet or measured, and the time that it takes to compute and to send."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_oprd.config import ParallelConfig
from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.planning.traffic import Traffic, group_spans


@dataclass(frozen=True)
class Hardware:
    """A device: rates per second, and the share of each rate that is assumed to be reached."""

    name: str = "H100 SXM"
    gpus_per_node: int = 8
    memory_size: int = 80 * 10**9  # bytes
    bf16_flops: float = 989e12
    fp8_flops: float = 1979e12
    memory_bytes: float = 3.35e12
    nvlink_bytes: float = 450e9  # in each direction
    network_bytes: float = 50e9  # 400 Gb/s for each GPU
    matrix_share: float = 0.45  # of bf16_flops, over all kernels of a pass
    fp8_share: float = 0.35  # of fp8_flops
    expert_share: float = 0.30  # of bf16_flops or fp8_flops for a model with experts
    memory_share: float = 0.7  # of memory_bytes
    link_share: float = 0.7  # of nvlink_bytes and network_bytes
    sync_bytes: float = 5e9  # weights to servers through shared memory, written and read
    layer_seconds: float | None = None  # of a layer in a decode step at least; None: `rollout_time.layer_time`

    def flops_rate(self, spec: ModelSpec, *, in_fp8: bool) -> float:
        """Return the operations per second that one GPU is assumed to reach in a pass of a model."""
        share = self.expert_share if spec.num_experts else self.fp8_share if in_fp8 else self.matrix_share
        return share * (self.fp8_flops if in_fp8 else self.bf16_flops)

    def memory_rate(self) -> float:
        """Return the bytes per second that one GPU is assumed to read or write."""
        return self.memory_bytes * self.memory_share


H100 = Hardware()
GPUS = {"h100": H100, "h200": Hardware("H200 SXM", memory_size=141 * 10**9, memory_bytes=4.8e12)}


@dataclass(frozen=True)
class Cost:
    """Cost of one part of a step."""

    name: str
    flops: float  # operations over all ranks
    nvlink: float  # bytes that a rank sends inside its node
    network: float  # bytes that a rank sends to other nodes
    seconds: float


@dataclass(frozen=True)
class Links:
    """The connections between ranks: NVLink inside a node, the network between nodes."""

    hardware: Hardware
    world_size: int

    def cost(
        self, name: str, flops: float, seconds: float, traffic: Traffic, layout: ParallelConfig, overlaps: bool = False
    ) -> Cost:
        """Return the cost of a part that computes for `seconds` and sends `traffic`.

        `overlaps`: True if it sends while it computes, so that communication takes no time of its own.
        """
        hardware, spans = self.hardware, group_spans(layout, self.world_size)
        nvlink = network = 0.0
        for group, size in dataclasses.asdict(traffic).items():
            if spans[group] <= hardware.gpus_per_node:
                nvlink += size
            else:
                network += size
        sending = (nvlink / hardware.nvlink_bytes + network / hardware.network_bytes) / hardware.link_share
        return Cost(name, flops, nvlink, network, seconds if overlaps else seconds + sending)
