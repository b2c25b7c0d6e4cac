"""Write docs/results/cost.md from docs/results/cost.json."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.pages import GIB, MIB, gib, listed, milliseconds, table_lines
from benchmarks.updates import AUTHORED, Workload

OPRD = ("megatron_oprd", "OPRD, all tokens")
ON_A_GPU = {"cost": "own", "cost with Transformer Engine": "Transformer Engine"}  # modules by part of gpu.json
HEAD_SHARE = 0.178  # operations of the LM head, as a share of the blocks', in the paper's model

HEAD = """# What an update costs

The paper's Table 3, made again: memory and time of one student update (teacher pass, forward, backward, AdamW) by
objective, on the same rollouts. `python benchmarks/cost.py` writes this page. Full recomputation everywhere.

**Step peak**: the most that is alive during an update, beside weights, gradients, optimizer state and the frozen
teacher. **Unchunked**: all logits of the micro-batch at once (`chunk_tokens: null`), in the same code. **As authored**:
what the paper's authors run for their top-16 baseline, unchunked, after one more forward pass of the student that finds
its top 16 and its entropy from the logits of all tokens.
"""

PREDICTED = """## Predicted: memory at the paper's size

{versions}.

Not measured: the real update on tensors without values, on a CPU. {layers} layers of width 1536, vocabulary
151,936, untied, bf16; "last" are 2,000 tokens. `tests/unit/test_update_trace.py` and `tests/end_to_end/test_dry_run.py`
hold such predictions against real updates, within 10 %. Resident beside the step peak: {resident} GiB (one process,
AdamW). Top-16 as authored peaks as top-16 unchunked does: the pass before it needs less.

Step peak in GiB:
"""

GPU = """## Measured beside predicted: the paper's size on a GPU

{device}, one sequence of 16,384 tokens, full recomputation.
These are the runs of {dates} in [gpu.md](gpu.md). "Times OPRD" compares with OPRD on the last
tokens; its prediction counts passes through the blocks, as the next section explains.

"""

GPU_NOTES = """
- **Memory** is as predicted, except for top-16. Unchunked, its prediction is 8 % too high: by one byte for each
  logit; which tensor that is was not examined. As authored it needs 2 % more than predicted, because the prediction is
  that of top-16 unchunked, without the pass that finds the top 16.
- **Time** on all logits at once is near the count of passes. Chunks took 10 to 14 % of OPRD's time more. Their code has
  been replaced since: full KL of 8,192 tokens took 100 ms then, and 35 ms since the second run ([gpu.md](gpu.md)).
- **Top-16 as authored** is slower than counted. Beyond one more pass through the blocks, it takes about 270 ms more
  than OPRD on our own modules and 250 ms on Transformer Engine: products with the head, softmax and top-k, which faster
  blocks do not shorten. So it is 1.45 times as slow as OPRD on our own modules of that day, and 1.57 times on
  Transformer Engine.
"""

MEASURED = """## Measured: time and memory on {place}

{versions}.

Qwen2, MLP of width {ffn}, vocabulary {vocabulary:,}, {dtype}: products of the LM head are {ratio} of the blocks'
(0.178 in the paper's model, whose vocabulary is 17 times as wide as its MLP: that ratio sets what logits weigh in
memory). Prompts of {prompt} tokens, responses of {responses}; "last" are {last} tokens; chunks of {chunk} tokens.
`plain torch` is the same update on Hugging Face's model as it would be written by hand: rows padded to the longest,
logits of all tokens whatever the loss, `gradient_checkpointing_enable()`, `torch.optim.AdamW`.

In passes through the blocks, with h for one product of the LM head, an update is 5 for OPRD (teacher, student, again
for recomputation, 2 backward) and 6 + 5h for top-16 as authored (one pass more; a head in both forward passes of the
student, the teacher's and backward): 1.38 times as much at h = 0.178. What is measured above that are softmax and top-k
over the logits; without recomputation it would be 5 + 5h over 4, 1.47 times.

Medians of {repeats} updates that take turns; "times OPRD": the median, and the range, of the ratios turn by turn.

"""
COLUMNS = ("", "method", "seconds", "times OPRD, all tokens", "step peak, MiB", "predicted")


def markdown(record: dict[str, Any], on_gpu: Sequence[dict[str, Any]] = ()) -> str:
    """Return the page of a record. `on_gpu`: the runs of docs/results/gpu.json."""
    parts = [HEAD]
    if "predicted" in record:
        parts.append(_predicted(record["predicted"]))
    if on_gpu and "predicted" in record:
        parts.append(_measured_on_gpu(record, on_gpu))
    parts += [_measured(place, one) for place, one in record.get("measured", {}).items()]
    return "\n".join(parts)


def _predicted(part: dict[str, Any]) -> str:
    rows = part["rows"]
    resident = sorted({_resident(row) for row in rows})
    text = PREDICTED.format(
        versions=listed(part["versions"]), layers=part["layers"], resident=f"{resident[0]:.1f} to {resident[-1]:.1f}"
    )
    sizes = list(dict.fromkeys((row["sequences"], row["tokens"]) for row in rows))
    peaks = {(row["method"], row["sequences"], row["tokens"]): row["step_peak"] for row in rows}
    rows = [
        [method, *(f"{peaks[method, *size] / GIB:.2f}" for size in sizes)]
        for method in dict.fromkeys(row["method"] for row in rows)
    ]
    lines = table_lines(["sequences x tokens", *(f"{count} x {tokens:,}" for count, tokens in sizes)], rows)
    return "\n".join([text, *lines, ""])


def _measured_on_gpu(record: dict[str, Any], runs: Sequence[dict[str, Any]]) -> str:
    """Return the section on a GPU: of each part, the last run that has it."""
    last = {row["part"]: run for run in runs for row in run["rows"] if row["part"] in ON_A_GPU}
    rows = [row for part, run in last.items() for row in _gpu_rows(part, run, record)]
    devices, dates = ({run[key]: None for run in last.values()} for key in ("device", "date"))
    head = ("modules", "method", "ms", "times OPRD", "predicted", "step peak, GiB", "predicted")
    text = GPU.format(device=" and ".join(devices), dates=" and ".join(dates))
    return text + "\n".join([*table_lines(head, rows), GPU_NOTES])


def _gpu_rows(part: str, run: dict[str, Any], record: dict[str, Any]) -> Iterator[list[str]]:
    """Yield a row for each method. The first one, OPRD on the last tokens, is the base of the ratios."""
    predicted = {
        row["method"]: row["step_peak"]
        for row in record["predicted"]["rows"]
        if (row["sequences"], row["tokens"]) == (1, 16384)
    }
    if part != "cost":
        predicted = record["predicted_with_transformer_engine"]
    rows = [row for row in run["rows"] if row["part"] == part and row["tokens"] == 16384 and row["seconds"]]
    base = statistics.median(rows[0]["seconds"])
    for row in rows:
        method, seconds = row["name"], statistics.median(row["seconds"])
        peak = predicted.get("top-16, unchunked" if method == AUTHORED else method)
        ratios = f"{seconds / base:.2f}", f"{_passes(method) / _passes(rows[0]['name']):.2f}"
        yield [ON_A_GPU[part], method, milliseconds(row["seconds"]), *ratios, gib(row["step_peak"]), gib(peak)]


def _passes(method: str) -> float:
    """Return the operations of an update, in forward passes through the blocks."""
    if method.startswith("OPRD"):
        return 5
    return 6 + 5 * HEAD_SHARE if method == AUTHORED else 5 + 4 * HEAD_SHARE


def _resident(row: dict[str, Any]) -> float:
    return sum(row[name] for name in ("weights", "gradients", "optimizer", "teacher_weights")) / GIB


def _measured(place: str, part: dict[str, Any]) -> str:
    sizes, rows = part["workload"], part["rows"]
    ratio = f"{Workload(**sizes).head_over_body:.3f}"
    responses = ", ".join(map(str, sizes["responses"]))
    text = MEASURED.format(
        place=place,
        versions=listed(part["versions"]),
        ratio=ratio,
        repeats=len(rows[0]["seconds"]),
        **{**sizes, "responses": responses},
    )
    base = next((row["seconds"] for row in rows if (row["side"], row["method"]) == OPRD), rows[0]["seconds"])
    lines = []
    for row in rows:
        ratios = [seconds / oprd for seconds, oprd in zip(row["seconds"], base, strict=True)]
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        predicted = f"{row['predicted'] / MIB:.0f}" if "predicted" in row else ""
        seconds = f"{statistics.median(row['seconds']):.2f}"
        lines.append([row["side"], row["method"], seconds, times, f"{row['step_peak'] / MIB:.0f}", predicted])
    return text + "\n".join([*table_lines(COLUMNS, lines), ""])
