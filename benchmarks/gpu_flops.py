"""Count the operations of an update, its MFU on a device, and the predicted time on an H100 or H200."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.updates import Workload
from megatron_oprd.planning.flops import attention_flops, linear_flops

BACKWARD = 2  # in forward passes: one product for the inputs' gradient, one for the weights' gradient
Modules = Literal["bf16", "own", "tensorwise", "blockwise"]


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiplication and an addition count as two."""

    products: float = 0.0  # with the matrices of the blocks
    attention: float = 0.0  # of queries with keys, and with values

    @property
    def total(self) -> float:
        return self.products + self.attention

    def times(self, passes: float) -> Flops:
        return Flops(self.products * passes, self.attention * passes)


@dataclass(frozen=True)
class Gpu:
    """A device's data sheet."""

    peak: float  # operations a second in bf16, dense, sums in float32
    bandwidth: float  # bytes a second of its memory


# By the words of a device's name; the first match counts.
GPUS = {
    "H200": Gpu(989.4e12, 4.8e12),
    "H100 PCIe": Gpu(756e12, 2.0e12),
    "H100 NVL": Gpu(835e12, 3.9e12),
    "H100": Gpu(989.4e12, 3.35e12),
    "A100": Gpu(312e12, 2.0e12),
}

# Assumed for the predictions: the share of `Gpu.peak` that matrix products reach (FP8 has twice the peak but pays for
# rounding and scales), and the share that causal attention reaches over forward and backward.
PRODUCTS: dict[Modules, float] = {"bf16": 0.65, "own": 0.65, "tensorwise": 0.95, "blockwise": 0.85}
ATTENTION: dict[Modules, float] = {"bf16": 0.45, "own": 0.35, "tensorwise": 0.45, "blockwise": 0.45}
# Memory traffic outside of matrix products (norms, rotation, SwiGLU, residuals): bytes per token, block and pass.
TRAFFIC = {"hidden": 40, "ffn": 10}
OPTIMIZER_BYTES = 30  # per parameter: reads fp32 weight, moments and gradient, writes weight and moments


def block_weights(workload: Workload) -> int:
    """Return N, the weights of all blocks' matrices, without embedding, LM head, norms and biases."""
    return workload.layers * linear_flops(workload.spec, 0) // 2


def forward_flops(workload: Workload, *, causal: bool = True) -> Flops:
    """Return the operations of one forward pass through the blocks over the workload's rollouts.

    2 N per token, plus 4 T^2 d per block and sequence of T tokens (d: heads x head width); causal attention needs half.
    """
    lengths = sequence_lengths(workload)
    attention = workload.layers * attention_flops(workload.spec, lengths)
    return Flops(2 * block_weights(workload) * sum(lengths), attention * (1 if causal else 2))


def training_flops(workload: Workload, *, causal: bool = True) -> Flops:
    """Return the operations of forward and backward: three forward passes, without recomputation."""
    return forward_flops(workload, causal=causal).times(1 + BACKWARD)


def sequence_lengths(workload: Workload) -> list[int]:
    return [workload.prompt + length for length in workload.responses]


def utilization(flops: float, seconds: float, device: str) -> float | None:
    """Return the share of the device's bf16 peak (MFU if `flops` counts the model alone); None if GPUS has no entry."""
    gpu = find_gpu(device)
    return flops / seconds / gpu.peak if gpu else None


def find_gpu(device: str) -> Gpu | None:
    return next((gpu for name, gpu in GPUS.items() if all(word in device for word in name.split())), None)


def predicted_seconds(
    workload: Workload, modules: Modules, gpu: Gpu, *, passes: float, trained: int = 0, bf16_blocks: int = 0
) -> float:
    """Predict the seconds of `passes` forward passes and an optimizer step over `trained` parameters.

    `passes`: 1 for forward, 3 with backward, 4 with recomputation. `bf16_blocks`: blocks that stay out of FP8. Matrix
    products, attention and memory traffic are added up at the assumed rates.
    """
    flops = forward_flops(workload).times(passes)
    outside = bf16_blocks / workload.layers
    products = flops.products * ((1 - outside) / PRODUCTS[modules] + outside / PRODUCTS["bf16"]) / gpu.peak
    attention = flops.attention / (ATTENTION[modules] * gpu.peak)
    a_token = TRAFFIC["hidden"] * workload.hidden + TRAFFIC["ffn"] * workload.ffn
    traffic = passes * sum(sequence_lengths(workload)) * workload.layers * a_token + OPTIMIZER_BYTES * trained
    return products + attention + traffic / gpu.bandwidth
