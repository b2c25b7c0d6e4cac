"""Time losses on next-token distributions from hidden states: chunked, unchunked, plain torch, and other packages.

    python benchmarks/fused_losses.py [--tokens 8192 --hidden 1536 --vocabulary 151936] [--repeats 5] [--json FILE]

Each repeat times every case once, so that load from other processes affects all alike. A case computes value and
gradients of hidden states and LM head. The peak is the memory above the inputs, measured on a GPU alone.

Liger's fused JSD and cut-cross-entropy need a GPU and Triton. A case that cannot run is printed with the reason.
Liger's has both models, as `full KL` has. cut-cross-entropy computes the log-probability of one token under one model:
compare it with `sampled token`, which has the teacher's product too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_oprd.config import OutputConfig, ParallelConfig
from megatron_oprd.losses.lm_head import HeadInput
from megatron_oprd.losses.reverse_kl import weighted_reverse_kl
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.runtime import platform
from megatron_oprd.runtime.cli import run_command
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import DeviceSelection

OLD_CHUNK = 2**27 // 4  # numbers in a chunk: the size `auto` before products decided it
LIGER = ("liger_kernel.transformers.fused_linear_jsd", "LigerFusedLinearJSD")
Run = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Hidden states [N, d] of both models at the same tokens, their heads [V, d], and the token ids [N]."""

    student: torch.Tensor
    head: torch.nn.Parameter
    teacher: torch.Tensor
    teacher_head: torch.Tensor
    token_ids: torch.Tensor

    @classmethod
    def random(cls, tokens: int, hidden: int, vocabulary: int, device: torch.device) -> Inputs:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        student, teacher = (torch.randn(tokens, hidden, device=device, dtype=dtype) for _ in range(2))
        head, teacher_head = (
            torch.randn(vocabulary, hidden, device=device, dtype=dtype) / hidden**0.5 for _ in range(2)
        )
        token_ids = torch.randint(vocabulary, (tokens,), device=device)
        return cls(student.requires_grad_(), torch.nn.Parameter(head), teacher, teacher_head, token_ids)


def cases(inputs: Inputs) -> dict[str, Run | str]:
    """Return the cases by name: a function that computes value and gradients, or the reason why it cannot run here."""
    old_chunk = max(OLD_CHUNK // len(inputs.head), 1)
    return {
        "full KL, chunked": own(inputs, "full_kl", "auto"),
        "full KL, chunks of 128 MiB": own(inputs, "full_kl", old_chunk),
        "full KL, unchunked": own(inputs, "full_kl", None),
        "full KL, as a library": lambda: backward(
            weighted_reverse_kl(
                HeadInput(inputs.student, inputs.head),
                HeadInput(inputs.teacher, inputs.teacher_head),
                torch.ones(len(inputs.student), device=inputs.student.device),
            )[0]
        ),
        "full KL, plain torch": lambda: backward(plain_reverse_kl(inputs)),
        "sampled token, chunked": own(inputs, "sampled", "auto"),
        "sampled token, unchunked": own(inputs, "sampled", None),
        "JSD 0.5, chunked": own(inputs, "full_kl", "auto", direction="jsd"),
        "JSD 0.5, Liger": of_package(*LIGER, inputs, functools.partial(liger_jsd, beta=0.5)),
        "full KL, Liger": of_package(*LIGER, inputs, functools.partial(liger_jsd, beta=1.0)),
        "cross-entropy, cut-cross-entropy": of_package("cut_cross_entropy", "linear_cross_entropy", inputs, cut_loss),
    }


def own(inputs: Inputs, objective: str, chunk_tokens: int | str | None, **settings: Any) -> Run:
    """Return the objective as training runs it. The gradient of the head is accumulated in float32."""
    device, rows = inputs.student.device, torch.arange(len(inputs.student), device=inputs.student.device)
    start_process(device)
    topology = build_topology(ParallelConfig(), device, seed=0)
    config = OutputConfig.model_validate({"objective": objective, "chunk_tokens": chunk_tokens, **settings})
    if getattr(inputs.head, "main_grad", None) is None:
        inputs.head.main_grad = torch.zeros_like(inputs.head, dtype=torch.float32)
    heads = Heads(inputs.head, (inputs.teacher_head,), 0)
    loss = OutputLoss(config, heads, topology, temperature=1.0, with_metrics=False)
    weights = torch.ones(len(rows), dtype=torch.float64, device=device)
    selection = DeviceSelection(rows, weights, inputs.token_ids, (len(rows),), {0: rows})
    return lambda: loss(inputs.student.detach(), inputs.teacher, selection)


def plain_reverse_kl(inputs: Inputs) -> torch.Tensor:
    """Return the loss by autograd on the logits of all tokens in float32."""
    log_p = (inputs.student @ inputs.head.t()).float().log_softmax(-1)
    log_q = (inputs.teacher @ inputs.teacher_head.t()).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def backward(loss: torch.Tensor) -> None:
    loss.backward()


def of_package(module: str, name: str, inputs: Inputs, make: Callable[[Any, Inputs], Run]) -> Run | str:
    """Return the case of another package, or the reason why it cannot run here."""
    if inputs.student.device.type != "cuda":
        return "needs a GPU"
    try:
        return make(getattr(importlib.import_module(module), name), inputs)
    except (ImportError, AttributeError) as error:
        return f"not installed: {error}"


def liger_jsd(loss: Any, inputs: Inputs, beta: float) -> Run:
    """Return Liger's JSD; its limit at `beta` 1 is the reverse KL."""
    jsd = loss(jsd_beta=beta)
    return lambda: backward(jsd(inputs.student, inputs.head, inputs.teacher, inputs.teacher_head, None))


def cut_loss(linear_cross_entropy: Any, inputs: Inputs) -> Run:
    return lambda: backward(linear_cross_entropy(inputs.student, inputs.head, inputs.token_ids, reduction="sum"))


def measure(inputs: Inputs, repeats: int) -> list[dict[str, Any]]:
    """Return one row for each case: seconds of every repeat, peak bytes, and a note if it did not run."""
    device, rows, running = inputs.student.device, [], {}
    for name, run in cases(inputs).items():
        row = {"case": name, "seconds": [], "peak": None, "note": run if isinstance(run, str) else ""}
        rows.append(row)
        if isinstance(run, str):
            continue
        try:
            platform.reset_peak_memory(device)
            before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
            clear_gradients(inputs)
            run()
            if device.type == "cuda":
                row["peak"] = torch.cuda.max_memory_allocated(device) - before
            running[name] = (run, row)
        except Exception as error:  # the other cases still run
            row["note"] = f"{type(error).__name__}: {error_line(error, 150)}"
    for _ in range(repeats):
        for run, row in running.values():
            clear_gradients(inputs)
            row["seconds"].append(seconds(run, device))
    return rows


def clear_gradients(inputs: Inputs) -> None:
    inputs.student.grad = inputs.head.grad = None


def seconds(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def lines(rows: list[dict[str, Any]]) -> list[str]:
    made = ["| case | ms | peak, MiB | |", "|---|---|---|---|"]
    for row in rows:
        time_of = f"{1e3 * statistics.median(row['seconds']):.1f}" if row["seconds"] else ""
        peak = "" if row["peak"] is None else f"{row['peak'] / 2**20:.0f}"
        made.append(f"| {row['case']} | {time_of} | {peak} | {row['note']} |")
    return made


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    device = platform.choose_device("auto")
    inputs = Inputs.random(options.tokens, options.hidden, options.vocabulary, device)
    rows = measure(inputs, options.repeats)
    print("\n".join(lines(rows)), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": str(device), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
