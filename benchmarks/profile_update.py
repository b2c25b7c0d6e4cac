"""Show where the time of a student's update goes, by part and by direction, with the number of launches.

    python benchmarks/profile_update.py [--method "OPRD, last tokens" | --modules te] [--tiny] [--json FILE]

The model has the paper's shape and random weights; `--tiny` runs a small model, on a CPU too. `--method` profiles the
whole update of a method (teacher pass, forward, backward, AdamW) with our own modules; `--modules own` or `te` profiles
the student's part of an update alone.

Time on a GPU is the time of kernels, and a launch is a kernel, copy or fill. On a CPU, time is the time inside of
operators, and a launch is an operator that computes. `idle` is the rest of the update: the GPU has no work, or Python
runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer import optimizer
from torch.profiler import ProfilerActivity, profile, record_function

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost import PAPER
from benchmarks.gpu import TINY
from benchmarks.gpu_cases import OPRD, STUDENTS, Case, prepare
from benchmarks.updates import METHODS, Update
from megatron_oprd.models import attention, norm, output_loss, swiglu, taps
from megatron_oprd.runtime import platform
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.environment import find_machine
from megatron_oprd.types import UserError

PART = "part: "
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_scaled_mm", "general_gemm")
ATTENTION = ("attention", "fused_attn", "flash")
# Transformer Engine starts its kernels outside of torch's operators: parts by words in the names of kernels.
KERNELS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma"),
    "attention": ("fmha", "flash", "attention", "sdpa"),
    "norms": ("norm",),
    "MLP activation": ("silu", "swiglu"),
    "optimizer": ("adam", "l2norm"),
}
# Operators that compute nothing.
VIEWS = {
    *("view", "reshape", "_reshape_alias", "_unsafe_view", "as_strided", "slice", "select", "split", "chunk", "narrow"),
    *("split_with_sizes", "squeeze", "unsqueeze", "transpose", "t", "numpy_T", "permute", "expand", "expand_as"),
    *("detach", "detach_", "alias", "unbind", "flatten", "unflatten", "view_as", "resolve_conj", "resolve_neg"),
    *("empty", "empty_like", "empty_strided", "new_empty", "resize_", "set_", "item", "_local_scalar_dense"),
    *("is_nonzero", "lift_fresh", "result_type", "pin_memory", "is_pinned"),
}
SYNCHRONISATIONS = {"aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize", "cudaDeviceSynchronize"}
PART_NAMES = ("products", "attention", "rotary", "norms", "MLP activation", "taps and loss", "optimizer", "other")


@dataclasses.dataclass
class Cost:
    """The time and the launches of one part of an update."""

    milliseconds: float = 0.0
    launches: int = 0


@dataclasses.dataclass(frozen=True)
class Profile:
    """An update by part. A product belongs to `products` wherever it runs, also inside of the loss."""

    parts: dict[str, Cost]
    milliseconds: float  # of the update, by the clock
    synchronisations: int  # times that the CPU waits for values of the device

    @property
    def idle(self) -> float:
        return max(self.milliseconds - sum(part.milliseconds for part in self.parts.values()), 0.0)

    def lines(self) -> list[str]:
        rows = [f"| {name} | {cost.milliseconds:.2f} | {cost.launches} |" for name, cost in self.parts.items()]
        launches = sum(cost.launches for cost in self.parts.values())
        return [
            "| part | ms | launches |",
            "|---|---|---|",
            *rows,
            f"| idle | {self.idle:.2f} | |",
            f"| update | {self.milliseconds:.2f} | {launches} |",
            f"| waits for the device | | {self.synchronisations} |",
        ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--method", choices=METHODS, default=OPRD)
    choice.add_argument("--modules", choices=("own", "te"), help="the student's part alone, on these modules")
    parser.add_argument("--tiny", action="store_true", help="a small model, on a CPU too")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    device = platform.choose_device("auto")
    if device.type != "cuda" and not options.tiny:
        raise UserError("benchmarks/profile_update.py needs a CUDA device, and there is none; use --tiny on a CPU")
    workload = TINY if options.tiny else PAPER
    if options.modules is None:
        case = Case("cost", options.method, workload)
    else:
        name = "bf16, Transformer Engine" if options.modules == "te" else "bf16, own modules"
        modules, settings = STUDENTS[name]
        case = Case("student update", name, workload, settings, modules, passes=3, repeated=1)
    measured = profile_update(prepare(case, device, find_machine()).run, device)
    print("\n".join([f"{case.part}: {case.name}", "", *measured.lines()]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(dataclasses.asdict(measured) | {"idle": measured.idle}, indent=1) + "\n")


def profile_update(update: Update, device: torch.device) -> Profile:
    """Run an update twice, and profile the second run."""
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with labelled():
        update()  # creates the optimizer's state and chooses kernels
        with profile(activities=activities) as profiler, record_function("update"):
            update()
            if on_cuda:
                torch.cuda.synchronize(device)
    events = profiler.events()
    labelled_update = next(event for event in events if event.name == "update")
    parts = {name: Cost() for name in PART_NAMES}
    labels = labels_by_sequence(events)
    for event in events:
        milliseconds, launches = (own_cost_on_cuda if on_cuda else own_cost_on_cpu)(event)
        if milliseconds or launches:
            part = parts[part_of(event, labels) or part_of_kernels(event)]
            part.milliseconds += milliseconds
            part.launches += launches
    waits = sum(event.name in SYNCHRONISATIONS for event in events)
    return Profile(parts, labelled_update.time_range.elapsed_us() / 1e3, waits)


@contextlib.contextmanager
def labelled() -> Iterator[None]:
    """Label the operators of our own modules with their part, inside the block."""
    places: tuple[tuple[Any, str, str], ...] = (
        (attention, "rotate", "rotary"),
        (norm.RMSNorm, "forward", "norms"),
        (swiglu.SwiGLU, "forward", "MLP activation"),
        (taps.StageLoss, "__call__", "taps and loss"),
        (taps.CaptureTap, "__call__", "taps and loss"),
        (output_loss.OutputLoss, "__call__", "taps and loss"),
        (optimizer.MixedPrecisionOptimizer, "step", "optimizer"),
        (optimizer.FP32Optimizer, "step", "optimizer"),
        (optimizer.ChainedOptimizer, "step", "optimizer"),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, part in places:
            stack.enter_context(mock.patch.object(owner, name, with_label(getattr(owner, name), part)))
        yield


def with_label(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(PART + part):
            return function(*args, **kwargs)

    return run


def labels_by_sequence(events: Any) -> dict[int, str]:
    """Return the part of each operator of a forward pass, by the number that its backward has too."""
    return {
        event.sequence_nr: label
        for event in events
        if event.sequence_nr >= 0 and not is_backward(event) and (label := own_label(event)) is not None
    }


def part_of(event: Any, labels: dict[int, str]) -> str | None:
    """Return the part of an operator: by its name, by the label around it, or by the label of its forward pass."""
    names = [one.name.lower() for one in ancestors(event)]
    if any(name.startswith(PRODUCTS) for name in names):
        return "products"
    label = own_label(event)
    if label is None:
        numbers = (one.sequence_nr for one in ancestors(event) if is_backward(one))
        label = next((labels[number] for number in numbers if number in labels), None)
    if label is None and any(word in name for name in names for word in ATTENTION):
        return "attention"
    return label


def part_of_kernels(event: Any) -> str:
    """Return the part of an operator by the names of its kernels, or `other`."""
    names = " ".join(kernel.name.lower() for kernel in event.kernels)
    return next((part for part, words in KERNELS.items() if any(word in names for word in words)), "other")


def own_label(event: Any) -> str | None:
    """Return the innermost label around an event."""
    names = (one.name for one in ancestors(event))
    return next((name.removeprefix(PART) for name in names if name.startswith(PART)), None)


def is_backward(event: Any) -> bool:
    return bool(event.name.startswith("autograd::engine") or event.name.endswith("Backward"))


def ancestors(event: Any) -> Iterator[Any]:
    """Yield the event and the events around it, from the inside to the outside."""
    while event is not None:
        yield event
        event = event.cpu_parent


def own_cost_on_cuda(event: Any) -> tuple[float, int]:
    """Return the milliseconds and the number of the kernels that an operator itself starts."""
    return sum(kernel.duration for kernel in event.kernels) / 1e3, len(event.kernels)


def own_cost_on_cpu(event: Any) -> tuple[float, int]:
    """Return the milliseconds of an operator without the operators inside of it, and 1 if it computes itself."""
    if not event.name.startswith("aten::"):
        return 0.0, 0
    return event.self_cpu_time_total / 1e3, int(computes(event) and not any(map(computes, event.cpu_children)))


def computes(event: Any) -> bool:
    return event.name.startswith("aten::") and event.name.removeprefix("aten::") not in VIEWS


if __name__ == "__main__":
    run_command(main)
