"""Write docs/results/objectives.md and its plots from docs/results/objectives.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.pages import listed, spread, table_lines
from megatron_oprd.report.charts import INK, curve_mark, dot_mark, line_mark, stroke, svg_file, text_mark

PARTS = ("step", "rollout", "teacher", "student")
TIMED_STEPS, WARM_UP_STEPS = 12, 2
NAMES = {
    "oprd": "OPRD, all layers",
    "oprd_last": "OPRD, last layer",
    "sampled": "sampled token",
    "top4_surrogate": "top-4 surrogate",
    "top4_kl": "top-4 KL, reverse",
    "full_kl": "full KL, reverse",
    "full_kl_forward": "full KL, forward",
    "jsd": "JSD, beta 0.5",
    "oprd_full_kl": "OPRD + full KL, reverse",
}
MEANING = """\
Made by `python benchmarks/objectives.py` on one CPU thread in fp32, from the pairs of the
[demo](../demo.md): Qwen3, 4 layers, width 96, adding two 3-digit numbers. Everything but the objective, its
learning rate and the number of steps is `examples/demo.yaml`: 64 prompts a step, one answer each at temperature 1,
AdamW, a cosine schedule over the run's own steps. A seed is that of the pair, of the order of the prompts and of the
rollouts. Accuracy is exact match on 1,000 held-out additions, one answer each; the learning rate was chosen on 1,000
others, by the mean of greedy accuracy over the seeds, the lower of two equal ones. Cells are the mean over the seeds
and, in brackets, the lowest and the highest.
"""
FAIRNESS = """\
- A pair's teacher was trained on from the student with embedding and LM head frozen, so both share one head and the
  teacher's states can be reached. That is OPRD's setting; the other objectives do not need it.
- The rest of the recipe was chosen for OPRD with all layers, on these seeds. Learning rates were searched for each
  objective, on the same grid; AdamW's betas, clipping, schedule and the number of prompts were not.
- The vocabulary has 16 symbols. The student's likeliest four hold more than 99.5 % of both distributions before
  training (mean over reference answers), so top-k is close to full KL here; and an LM head of 16 rows costs next to
  nothing. With 150,000 symbols neither holds: [cost.md](cost.md) has the memory at the paper's size.
- Answers have 6 tokens. What long answers do to the noisy signal of one sampled token is not seen here.
- OPRD alone gives the LM head no gradient; with the other objectives it is trained.
- Few seeds, one task, one size: ranges that overlap say nothing about order.
"""
COLORS = {"greedy": "#2563eb", "sampled": "#ea7317"}


def values(runs: Sequence[dict[str, Any]], metric: str, objective: str, rate: float) -> list[float]:
    """Return a metric of an objective at a learning rate, in percent, one value per seed."""
    return [100 * run[metric] for run in runs if (run["objective"], run["learning_rate"]) == (objective, rate)]


def pair_values(record: dict[str, Any], model: str, metric: str) -> list[float]:
    """Return a metric of the start student or of the teacher, in percent, one value per seed."""
    return [100 * pair[model][metric] for pair in record["pairs"].values()]


def markdown(record: dict[str, Any]) -> str:
    """Return the page of a record."""
    best, seconds, first = record["best_learning_rate"], record["seconds"], next(iter(record["best_learning_rate"]))
    lines = [
        "# Objectives on the demo",
        "",
        listed(record["versions"]),
        "",
        MEANING,
        "![accuracy](objectives-accuracy.svg)",
        "",
    ]

    def cells(part: str, objective: str) -> list[str]:
        return [spread(values(record[part], metric, objective, best[objective])) for metric in ("greedy", "sampled")]

    rows = [
        [f"_{name}_", "", *(spread(pair_values(record, model, metric)) for metric in COLORS)]
        for name, model in (("student before", "student"), ("teacher", "teacher"))
    ]
    rows += [[NAMES[objective], f"{best[objective]:g}", *cells("equal_steps", objective)] for objective in best]
    lines += [f"## Equal steps: {record['steps']}", ""]
    lines += [*table_lines(["objective", "best learning rate", "greedy, %", "temperature 0.7, %"], rows), ""]
    rows = [
        [
            NAMES[objective],
            record["equal_time_steps"][objective],
            *cells("equal_time", objective),
            *(f"{1000 * seconds[objective][part]:.0f}" for part in PARTS),
        ]
        for objective in best
    ]
    lines += [
        f"## Equal time: that of {record['steps']} steps of {NAMES[first]}",
        "",
        "At the learning rates above. Steps were timed apart, in short runs of all objectives in turn, on a machine "
        f"shared with other work: medians of {TIMED_STEPS - WARM_UP_STEPS} steps in milliseconds, from the quietest of "
        f"{record['rounds']} rounds. Teacher: its pass up to the compared states; student: its update.",
        "",
        *table_lines(["objective", "steps", "greedy, %", "temperature 0.7, %", "a step", *PARTS[1:]], rows),
        "",
        "## Every learning rate",
        "",
        f"Greedy validation accuracy after {record['steps']} steps, %; the best in bold.",
        "",
        *table_lines(["objective", *(f"{rate:g}" for rate in record["learning_rates"])], _rate_rows(record)),
        "",
        "![accuracy against the learning rate](objectives-learning.svg)",
        "",
        "## What it says",
        "",
        *_findings(record),
        "",
        "## What is fair here, and what is not",
        "",
        "",
    ]
    return "\n".join(lines) + FAIRNESS


def _rate_rows(record: dict[str, Any]) -> list[list[str]]:
    rows = []
    for objective, best in record["best_learning_rate"].items():
        cells = []
        for rate in record["learning_rates"]:
            text = spread(values(record["equal_steps"], "validation", objective, rate))
            cells.append(f"**{text}**" if rate == best else text)
        rows.append([NAMES[objective], *cells])
    return rows


def _findings(record: dict[str, Any]) -> list[str]:
    """Return the findings: the best objective, ranges that overlap, rates at an end of the grid, and losses."""
    best, rates = record["best_learning_rate"], record["learning_rates"]
    lines = []
    for part, name in (("equal_steps", "equal steps"), ("equal_time", "equal time")):
        greedy = {objective: values(record[part], "greedy", objective, best[objective]) for objective in best}
        top = max(greedy, key=lambda objective: statistics.mean(greedy[objective]))
        near = [NAMES[other] for other in greedy if other != top and max(greedy[other]) >= min(greedy[top])]
        lines.append(
            f"- {name.capitalize()}, greedy: the highest mean is that of {NAMES[top]}; "
            + (f"the ranges of {'; '.join(near)} overlap with its own." if near else "no other range overlaps its own.")
        )
    edge = [f"{NAMES[objective]} ({rate:g})" for objective, rate in best.items() if rate in (rates[0], rates[-1])]
    if edge:
        lines.append(f"- Best at an end of the grid, so perhaps better beyond it: {'; '.join(edge)}.")
    start = statistics.mean(pair_values(record, "student", "validation"))
    worse = []
    for objective in best:
        means = {rate: statistics.mean(values(record["equal_steps"], "validation", objective, rate)) for rate in rates}
        if found := [f"{rate:g}" for rate, mean in means.items() if mean < start]:
            worse.append(f"{NAMES[objective]} at {', '.join(found)}")
    if worse:
        lines.append(f"- Worse than the student before: {'; '.join(worse)}.")
    return lines


def accuracy_plot(record: dict[str, Any]) -> str:
    """Draw held-out accuracy at the best learning rate: a dot per seed and a bar at the mean."""
    best, row, marks = record["best_learning_rate"], 34, []
    panels = {
        title: {name: [values(record[part], metric, name, best[name]) for metric in COLORS] for name in best}
        for part, title in (("equal_steps", "equal steps"), ("equal_time", "equal time"))
    }
    worst = min(value for panel in panels.values() for pair in panel.values() for found in pair for value in found)
    lowest, height = int(20 * (min(worst, 99) // 20)), 70 + row * len(best)
    for place, (title, panel) in enumerate(panels.items()):
        left, right = 190 + 360 * place, 500 + 360 * place
        marks.append(text_mark(left, 34, title, "start", bold=True))
        for tick in range(lowest, 101, 20 if lowest < 60 else 10 if lowest < 80 else 5):
            x = _across(tick, lowest, left, right)
            marks += [line_mark((x, 44), (x, height - 24), stroke()), text_mark(x, height - 8, f"{tick} %", "middle")]
        for number, pair in enumerate(panel.values()):
            for side, (found, color) in enumerate(zip(pair, COLORS.values(), strict=True)):
                xs, y = [_across(value, lowest, left, right) for value in found], 57 + row * number + 12 * side
                marks += [dot_mark((x, y), 4, f'fill="{color}" fill-opacity="0.55"') for x in xs]
                mean = statistics.mean(xs)
                marks.append(line_mark((mean, y - 6), (mean, y + 6), stroke(color, 2.5)))
    marks += [text_mark(178, 67 + row * place, NAMES[objective], "end") for place, objective in enumerate(best)]
    for place, (color, label) in enumerate(zip(COLORS.values(), ("greedy", "temperature 0.7"), strict=True)):
        marks.append(dot_mark((196 + 70 * place, 14), 4, f'fill="{color}"'))
        marks += [text_mark(204 + 70 * place, 18, label, "start")]
    marks.append(text_mark(400, 18, "a dot a seed, a bar at the mean", "start"))
    return svg_file(890, height, "Held-out accuracy of each objective at its best learning rate", marks)


def _across(value: float, lowest: float, left: float, right: float) -> float:
    return left + (right - left) * (value - lowest) / (100 - lowest)


def learning_plot(record: dict[str, Any]) -> str:
    """Draw greedy validation accuracy by learning rate: the mean, and the range over seeds."""
    rates, columns, width, height, marks = record["learning_rates"], 3, 280, 170, []
    lowest, decades = math.log10(rates[0]), max(math.log10(rates[-1] / rates[0]), 1e-9)
    start = statistics.mean(pair_values(record, "student", "validation"))
    for place, objective in enumerate(record["best_learning_rate"]):
        left, top = 64 + width * (place % columns), 34 + height * (place // columns)
        right, bottom = left + width - 70, top + height - 65
        marks.append(text_mark(left, top - 10, NAMES[objective], "start", bold=True))
        for tick in (0, 50, 100):
            y = bottom - (bottom - top) * tick / 100
            marks += [
                line_mark((left - 12, y), (right + 12, y), stroke()),
                text_mark(left - 18, y + 4, f"{tick} %", "end"),
            ]
        y = bottom - (bottom - top) * start / 100
        marks.append(line_mark((left - 12, y), (right + 12, y), stroke(INK, 1, dashes="2 4")))
        points = []
        for rate in rates:
            found = values(record["equal_steps"], "validation", objective, rate)
            x = left + (right - left) * (math.log10(rate) - lowest) / decades
            heights = (min(found), statistics.mean(found), max(found))
            low, mean, high = (bottom - (bottom - top) * value / 100 for value in heights)
            marks += [
                line_mark((x, low), (x, high), stroke(COLORS["greedy"], 2)),
                text_mark(x, bottom + 18, f"{rate:g}", "middle"),
            ]
            marks.append(dot_mark((x, mean), 4, f'fill="{COLORS["greedy"]}"'))
            points.append((x, mean))
        marks.append(curve_mark(points, f'fill="none" stroke="{COLORS["greedy"]}"'))
    count = len(record["best_learning_rate"])
    full = height * math.ceil(count / columns) + 24
    marks.append(text_mark(64, full - 6, "across: learning rate; dashed: the student before", "start"))
    return svg_file(
        20 + width * min(count, columns), full, "Greedy validation accuracy against the learning rate", marks
    )
