"""Count with torch's profiler what one decode step costs the host and the device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.rollout_engines import Generate
from megatron_oprd.types import Prompt

# New tokens of the two profiled runs. Both prefill and capture graphs, so their difference contains neither.
LENGTHS = (6, 10)
KINDS = ("operators", "kernels", "launches", "graph_launches", "copies_to_host")
LAUNCHES = {"cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"}


def calls_per_decode_step(generate: Generate, prompts: Sequence[Prompt], device: torch.device) -> dict[str, float]:
    """Return the calls of each kind in one decode step of all prompts.

    Returns: `operators` (calls of torch's operators, nested ones too), and with CUDA `kernels` (run on the device),
    `launches` (single kernels started by the host), `graph_launches`, and `copies_to_host`.
    """

    def run(new_tokens: int) -> None:
        generate(prompts, [new_tokens] * len(prompts))

    counts = []
    for new_tokens in LENGTHS:
        run(new_tokens)  # allocates, and captures graphs
        counts.append(count_calls(lambda new_tokens=new_tokens: run(new_tokens), device))
    short, long = counts
    return {kind: (long[kind] - short[kind]) / (LENGTHS[1] - LENGTHS[0]) for kind in long}


def count_calls(run: Callable[[], None], device: torch.device) -> Counter[str]:
    """Return how many calls of each kind a run makes."""
    on_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]) as profiled:
        run()
        if on_cuda:
            torch.cuda.synchronize()
    counts = Counter(dict.fromkeys(KINDS if on_cuda else KINDS[:1], 0))
    for event in profiled.key_averages():
        kind = kind_of(event.key, on_device=event.device_type == DeviceType.CUDA)
        if kind is not None:
            counts[kind] += event.count
    return counts


def kind_of(name: str, *, on_device: bool) -> str | None:
    """Return the kind of a profiled event, one of KINDS, or None for an event that is not counted."""
    if on_device:
        if name.startswith(("Memcpy", "Memset")):
            return "copies_to_host" if name.startswith("Memcpy DtoH") else None
        return "kernels"
    if name in LAUNCHES:
        return "launches"
    if name == "cudaGraphLaunch":
        return "graph_launches"
    return "operators" if name.startswith("aten::") else None
