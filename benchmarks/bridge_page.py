"""Write the measured part of docs/results/bridge.md and its plots from docs/results/bridge.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.pages import listed, spread, table_lines, with_section
from megatron_oprd.report.charts import curve_mark, line_mark, stroke, svg_file, text_mark

HEADING = "## Measured on tiny pairs"
TITLES = {
    "cross_architecture": "Other depth and width: a 4-layer Qwen3 of width 96 from a 6-layer one of width 128",
    "cross_tokenizer": "Another family and tokenizer: a 4-layer Qwen3 of width 96 from a Phi-3 of width 128",
}
NAMES = {
    "bridge_mu1": "bridge, weight 1",
    "bridge": "bridge, weight 10",
    "bridge_mu100": "bridge, weight 100",
    "bridge_trained": "bridge, weight 10, P_S trained",
    "top16": "top-16 surrogate",
    "full_kl": "full KL",
    "both_mu01": "full KL + bridge, weight 0.1",
    "both_mu1": "full KL + bridge, weight 1",
    "both": "full KL + bridge, weight 10",
    "fade": "bridge, faded into full KL in 10 steps",
    "switch": "bridge for 10 steps, then full KL",
    "fade_map": "last layer by a trained map, faded into full KL in 10 steps",
}
COLORS = ("#2563eb", "#ea7317", "#16a34a", "#9333ea", "#dc2626", "#0891b2")

MEANING = """\
Made by `python benchmarks/bridge.py` on CPU threads in fp32, from the pairs of `examples/demo/make_bridge_pair.py`:
three-digit additions, a student that stopped its training half-way, and a teacher with random weights of its own at the
start. Apart from the method and its learning rate, all settings are those of `examples/demo_<kind>.yaml`. Accuracy is
the exact match on 1,000 held-out additions. Each learning rate is the best on 1,000 other additions, by the mean over
seeds. A cell is the mean over the seeds, with the lowest and the highest in brackets. With AdamW and clipping, the
weight of a bridge that is the only loss changes nothing but units. With one tokenizer the vocabulary has 16 symbols, so
that top-16 covers it and has the gradient of full KL."""


def put_figures(page: Path, record: dict[str, Any]) -> None:
    """Replace the section under HEADING in the page, or add it."""
    page.write_text(with_section(page.read_text() if page.exists() else "", HEADING, figures(record)))


def figures(record: dict[str, Any]) -> str:
    """Return the section of a record, the last one of the page."""
    lines = [
        HEADING,
        "",
        f"{listed(record['versions'])}; {record['steps']} steps, seeds {', '.join(map(str, record['seeds']))}.",
        "",
        MEANING,
        "",
    ]
    for kind, part in record["kinds"].items():
        lines += [
            f"### {TITLES[kind]}",
            "",
            *_cosines(kind, part),
            *_methods(record, part),
            *_moved(part),
            *_collapse(part),
        ]
    return "\n".join(lines).rstrip() + "\n"


def _cosines(kind: str, part: dict[str, Any]) -> list[str]:
    rows = []
    for rank in ranks_of(part):
        before, after = ([100 * one for one in cosines(part, rank, side)] for side in ("cosine_before", "cosine_after"))
        explained = [100 * one for one in cosines(part, rank, "explained_variance")]
        rows.append([rank, spread(before), spread(after), spread(explained)])
    coverage = [pair["fit"]["origin"]["coverage"] for pair in part["pairs"]]
    kept = (
        [f"Sync points: {100 * min(coverage):.0f} to {100 * max(coverage):.0f} % of the response tokens.", ""]
        if coverage[0]
        else []
    )
    return [
        *kept,
        "Subspace cosine on held-out answers, mean over layers, %:",
        "",
        *table_lines(["rank", "before fitting", "after", "explained variance, %"], rows),
        "",
        f"![cosine by rank](bridge-{kind.replace('_', '-')}.svg)",
        "",
    ]


def cosines(part: dict[str, Any], rank: int, name: str) -> list[float]:
    """Return a figure of the fits at a rank, the mean over layers, one value per seed."""
    return [statistics.mean(one[name] for one in pair["fit"]["fits"] if one["rank"] == rank) for pair in part["pairs"]]


def ranks_of(part: dict[str, Any]) -> list[int]:
    return sorted({one["rank"] for one in part["pairs"][0]["fit"]["fits"]})


def values(part: dict[str, Any], method: str, rate: float, metric: str) -> list[float]:
    """Return a metric of a method at a learning rate, in percent, one value per seed."""
    chosen = (run for run in part["runs"] if (run["method"], run["learning_rate"]) == (method, rate))
    return [100 * run[metric] for run in chosen]


def best_rate(part: dict[str, Any], method: str, rates: Sequence[float]) -> float:
    """Return the learning rate with the best mean accuracy on the validation problems."""
    tried = [rate for rate in rates if values(part, method, rate, "validation")]
    return max(tried, key=lambda rate: statistics.mean(values(part, method, rate, "validation")))


def _methods(record: dict[str, Any], part: dict[str, Any]) -> list[str]:
    rates = record["learning_rates"]
    start = [spread([100 * pair["student"][metric] for pair in part["pairs"]]) for metric in ("greedy", "sampled")]
    rows: list[list[Any]] = [["_student before_", "", *start, *[""] * (1 + len(rates))]]
    for method in dict.fromkeys(run["method"] for run in part["runs"]):
        best = best_rate(part, method, rates)
        found = [spread(values(part, method, best, metric)) for metric in ("greedy", "sampled")]
        ends = [
            run["cosines"][-1]
            for run in part["runs"]
            if (run["method"], run["learning_rate"]) == (method, best) and run["cosines"]
        ]
        at_rates = [values(part, method, rate, "validation") for rate in rates]
        means = [f"{statistics.mean(found_at):.1f}" if found_at else "" for found_at in at_rates]
        rows.append([NAMES[method], f"{best:g}", *found, f"{statistics.mean(ends):.3f}" if ends else "", *means])
    head = [
        "method",
        "best rate",
        "greedy, %",
        "temperature 0.7, %",
        "cosine at the end",
        *(f"at {rate:g}" for rate in rates),
    ]
    return [
        f"After training, a bridge of rank {part['rank']}; the last columns: greedy validation accuracy at each rate:",
        "",
        *table_lines(head, rows),
        "",
    ]


def _moved(part: dict[str, Any]) -> list[str]:
    runs = [run for run in part["runs"] if run["method"] == "bridge"]
    if not runs:
        return []
    rates = sorted({run["learning_rate"] for run in runs})
    layers = sorted(runs[0]["moved"]["layers"], key=int)
    rank, width = runs[0]["moved"]["rank"], runs[0]["moved"]["width"]
    rows = []
    for rate in rates:
        of_rate = [run["moved"] for run in runs if run["learning_rate"] == rate]
        for name in ("share", "relative"):
            title = "inside, %" if name == "share" else "length, % of the state's"
            means = [f"{100 * statistics.mean(one['layers'][layer][name] for one in of_rate):.1f}" for layer in layers]
            rows.append([f"{rate:g}", title, *means])
    tokens = []
    for rate in rates:
        of_rate = [run["moved"]["next_token"] for run in runs if run["learning_rate"] == rate]
        means = [
            f"{100 * statistics.mean(one[name] for one in of_rate):.1f}"
            for name in ("start", "trained", "inside", "outside")
        ]
        tokens.append([f"{rate:g}", *means])
    return [
        "What a bridge alone (weight 10) moved: the change of the student's states on right answers, the part of its "
        f"squared length inside of the {rank} of {width} directions that P_S reads ({100 * rank / width:.1f} % for a "
        "change in no particular direction), and its length.",
        "",
        *table_lines(["rate", "change", *(f"layer {layer}" for layer in layers)], rows),
        "",
        "Accuracy on the next token of right answers, %: of both students, and of the last layer's start states with "
        "the change inside of these directions alone, and with that outside alone.",
        "",
        *table_lines(["rate", "start", "trained", "inside alone", "outside alone"], tokens),
        "",
    ]


def _collapse(part: dict[str, Any]) -> list[str]:
    rows = []
    for one in part["collapses"]:
        start = one["accuracy"][0][1]
        halved = next((step for step, accuracy in one["accuracy"] if accuracy < start / 2), None)
        warnings = ", ".join(f"{warning['step']} ({warning['kind']})" for warning in one["warnings"])
        cosine = [value for _, value in one["cosine"]]
        rows.append(
            [
                one["seed"],
                f"{100 * start:.1f} -> {100 * one['accuracy'][-1][1]:.1f}",
                f"{cosine[0]:.3f} -> {cosine[-1]:.3f}",
                f"{one['perplexity'][0][1]:.2f} -> {one['perplexity'][-1][1]:.3g}",
                warnings or "none",
                halved if halved is not None else "never",
            ]
        )
    rate = part["collapses"][0]["learning_rate"]
    head = [
        "seed",
        "greedy accuracy, %",
        "cosine",
        "perplexity of its own start answers",
        "warnings at step",
        "accuracy halved by step",
    ]
    return [
        f"A collapse on purpose: a bridge of rank 2 alone, at a constant learning rate of {rate:g} after a long "
        "warm-up, looked at every fifth step.",
        "",
        *table_lines(head, rows),
        "",
    ]


def cosine_plot(part: dict[str, Any]) -> str:
    """Draw the cosine by rank with a line per layer: the mean over seeds after fitting, dashed before fitting."""
    ranks, left, right, top, bottom = ranks_of(part), 60, 520, 30, 250
    layers = sorted({one["student"] for one in part["pairs"][0]["fit"]["fits"]})
    marks = []
    for tick in range(0, 101, 20):
        y = bottom - (bottom - top) * tick / 100
        marks += [line_mark((left, y), (right, y), stroke()), text_mark(left - 8, y + 4, f"{tick} %", "end")]
    across = {rank: left + (right - left) * place / max(len(ranks) - 1, 1) for place, rank in enumerate(ranks)}
    marks += [text_mark(x, bottom + 18, str(rank), "middle") for rank, x in across.items()]
    marks.append(text_mark((left + right) / 2, bottom + 36, "rank", "middle"))
    for place, (layer, color) in enumerate(zip(layers, COLORS, strict=False)):
        for side, dashes in (("cosine_after", "none"), ("cosine_before", "3 4")):
            points = []
            for rank in ranks:
                found = [
                    o[side]
                    for pair in part["pairs"]
                    for o in pair["fit"]["fits"]
                    if (o["rank"], o["student"]) == (rank, layer)
                ]
                points.append((across[rank], bottom - (bottom - top) * max(statistics.mean(found), 0)))
            style = f'fill="none" {stroke(color, 2, dashes)}'
            marks.append(curve_mark(points, style))
        y = top + 20 * place
        marks.append(line_mark((right + 20, y), (right + 40, y), stroke(color, 2)))
        marks.append(text_mark(right + 46, top + 4 + 20 * place, f"layer {layer}", "start"))
    marks.append(text_mark(right + 20, top + 20 * len(layers) + 8, "dashed: not fitted", "start"))
    return svg_file(680, 300, "Subspace cosine on held-out answers by rank", marks)
