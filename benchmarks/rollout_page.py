"""Write the figures of `benchmarks/rollout.py` as the last section of docs/results/rollouts.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.pages import MIB, listed, milliseconds, table_lines
from benchmarks.rollout_training import NEW_TOKENS, PROMPTS, SAMPLES

HEADING = "## Figures"
COLUMNS = (
    *("workload", "rows", "engine", "tokens/s", "decode step, ms", "prefill, ms", "first run, s", "sync, ms"),
    *("memory, MiB", "same answers"),
)
CALLS = ("rows", "engine", "operators", "kernels", "launches", "graph launches", "copies to the host")
TRAINING = f"""\
Training steps of `megatron_oprd.train` by the wall clock: {PROMPTS} prompts, {SAMPLES} samples of {NEW_TOKENS} tokens
each; student and teacher of the shape above:"""
TRAINING_COLUMNS = ("engine", "`rollout.ahead`", "step, ms", "rollouts, ms", "sync, ms")
EXPLANATION = """\
Made by `python benchmarks/rollout.py`. Engines run in turn with the same weights; medians of the repeats.

| column | meaning |
| --- | --- |
| tokens/s | new tokens of all responses, divided by the time for all of them, prompts included |
| decode step | time of a token of all rows, from the difference of two lengths: without prefill and capture of graphs |
| prefill | time for one token of each row: the prompts of all rows are computed |
| first run | the first run of the engine on this workload: allocation and capture of graphs |
| sync | transfer of the weights to the engine; the embedded engine uses the training weights |
| memory | peak above the memory in use before, weights not included; for a server, all of its processes |
| same answers | share of responses equal to those of the embedded engine, greedy only |
"""


def runs(records: Sequence[dict[str, Any]]) -> str:
    """Return the section: heading, meaning of the columns, and the tables of each record."""
    return "\n".join([f"{HEADING}\n", EXPLANATION, *map(section, records)])


def section(record: dict[str, Any]) -> str:
    """Return the part of one record: device, versions, model and tables."""
    shape = record["shape"]
    model = (
        f"{shape['family']}, {shape['layers']} layers of width {shape['hidden']}, vocabulary {shape['vocabulary']:,}, "
    )
    model += f"{'tied' if shape['tied'] else 'untied'}, {shape['dtype']}, random weights"
    lines = [f"### {record['date']}: {record['device']}", "", f"{listed(record['versions'])}.", ""]
    clock = "" if record["clock"] == "wall" else "; seconds are CPU seconds of all processes: the machine was shared"
    lines += [f"{model}; CPU threads: {record['threads']}; repeats: {record['repeats']}{clock}.", ""]
    lines += table_lines(COLUMNS, [_cells(row) for row in record["rows"]])
    counted = [row for row in record["rows"] if row["calls"]]
    if counted:
        lines += ["", "Calls in one decode step, by torch's profiler:", ""]
        lines += table_lines(CALLS, [_call_cells(row) for row in counted])
    if record["training"]:
        lines += ["", TRAINING, ""]
        lines += table_lines(TRAINING_COLUMNS, [_training_cells(row) for row in record["training"]])
    return "\n".join([*lines, ""])


def line(row: dict[str, Any]) -> str:
    """Return the line that is printed as soon as a row is measured."""
    head = f"{row['workload']}, {row['rows']} rows: {row['engine']}: "
    if row["note"]:
        return head + row["note"]
    parts = [f"{tokens_per_second(row):,.0f} tokens/s"]
    if row["prefill_seconds"]:
        parts += [
            f"decode step {milliseconds(decode_steps(row))} ms",
            f"prefill {milliseconds(row['prefill_seconds'])} ms",
        ]
    if row["same_answers"] is not None:
        parts.append(f"same answers {row['same_answers']:.0%}")
    if row["calls"]:
        parts.append(", ".join(f"{name} {count:.0f}" for name, count in row["calls"].items()) + " a step")
    return head + ", ".join(parts)


def tokens_per_second(row: dict[str, Any]) -> float:
    return row["tokens"] / statistics.median(row["seconds"])


def decode_steps(row: dict[str, Any]) -> list[float]:
    """Return the seconds of a decode step, one value per repeat, on a workload of equal lengths."""
    steps = row["new_tokens"][1] - row["short_tokens"]
    pairs = zip(row["seconds"], row["short_seconds"], strict=True)
    return [(seconds - short) / steps for seconds, short in pairs]


def _cells(row: dict[str, Any]) -> list[str]:
    head = [f"{row['workload']}: {_range(row['new_tokens'])} after {_range(row['prompt_tokens'])}"]
    head += [str(row["rows"]), row["engine"]]
    if row["note"]:
        return [*head, row["note"]]
    equal = bool(row["prefill_seconds"])
    memory = row["peak_bytes"] if row["server_bytes"] is None else row["server_bytes"]
    return [
        *head,
        f"{tokens_per_second(row):,.0f}",
        milliseconds(decode_steps(row)) if equal else "",
        milliseconds(row["prefill_seconds"]) if equal else "",
        f"{row['first_seconds']:.2f}",
        milliseconds(row["sync_seconds"]) if any(row["sync_seconds"]) else "0",
        f"{memory / MIB:,.0f}" if memory is not None else "",
        f"{row['same_answers']:.0%}" if row["same_answers"] is not None else "",
    ]


def _call_cells(row: dict[str, Any]) -> list[str]:
    calls = row["calls"]
    names = ("operators", "kernels", "launches", "graph_launches", "copies_to_host")
    return [str(row["rows"]), row["engine"], *(f"{calls[name]:,.0f}" if name in calls else "" for name in names)]


def _training_cells(row: dict[str, Any]) -> list[str]:
    head = [row["engine"], str(row["ahead"])]
    if row["note"]:
        return [*head, row["note"]]
    sync = milliseconds(row["sync/seconds"]) if row["sync/seconds"] else "0"
    return [*head, milliseconds(row["time/step"]), milliseconds(row["time/rollout"]), sync]


def _range(bounds: Sequence[int]) -> str:
    low, high = bounds
    return str(low) if low == high else f"{low} to {high}"
