"""The charts of a report about the student on the teacher's answers, from the lines of `evaluations.jsonl`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from megatron_oprd.evaluation.records import Point, Record, as_float
from megatron_oprd.evaluation.scores import over_all_sources
from megatron_oprd.report.charts import escape
from megatron_oprd.report.page import line_chart, number

CHARTS = {
    "Perplexity of the teacher's answers": {"student": "perplexity", "teacher": "teacher_perplexity"},
    "KL on the teacher's answers (nats)": {
        "KL(teacher || student)": "forward_kl",
        "KL(student || teacher)": "reverse_kl",
    },
    "Agreement on the most likely token, on the teacher's answers": {"": "argmax_agreement"},
}


def answer_charts(evaluations: Sequence[Record]) -> list[str]:
    """Return the charts over all data sources, or an empty list if the teacher did not answer."""
    scores = [(item.get("step"), over_all_sources(item["data"])) for item in evaluations]
    measured = [(step, values) for step, values in scores if isinstance(values, dict) and "perplexity" in values]
    if not measured:
        return []
    charts = [
        line_chart(title, {line: _curve(measured, metric) for line, metric in lines.items()})
        for title, lines in CHARTS.items()
    ]
    ends = {f"step {step}": _by_layer(values) for step, values in [measured[0], *measured[1:][-1:]]}
    title = "Cosine per layer on the teacher's answers, first and last evaluation"
    return [*charts, line_chart(title, ends if any(ends.values()) else {}, x_label="layer")]


def best_line(best: Record) -> str:
    """Return one line on the best evaluation, from `best.json`, or an empty string without one."""
    if "metric" not in best:
        return ""
    text = f"Best by {best['metric']}: step {number(best.get('step'))} with {number(best.get('value'))}"
    return f"<p>{escape(text)} (<code>{escape(best.get('checkpoint'))}</code>).</p>"


def _curve(measured: Sequence[tuple[Any, Record]], metric: str) -> list[Point]:
    return [(as_float(step), as_float(values[metric])) for step, values in measured if metric in values]


def _by_layer(values: Record) -> list[Point]:
    found = ((re.fullmatch(r"cosine/layer_(\d+)", name), value) for name, value in values.items())
    return sorted((float(match[1]), as_float(value)) for match, value in found if match)
