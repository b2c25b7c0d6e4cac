"""Draw the charts of a report about the student on the teacher's answers, from the lines of `evaluations.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_oprd.evaluation.records import Point, Record, as_float
from megatron_oprd.evaluation.scores import over_all_sources
from megatron_oprd.report.line_chart import line_chart

CHARTS = {
    "Perplexity of the teacher's answers": {"student": "perplexity", "teacher": "teacher_perplexity"},
    "KL on the teacher's answers (nats)": {
        "KL(teacher || student)": "forward_kl",
        "KL(student || teacher)": "reverse_kl",
    },
    "Agreement on the most likely token, on the teacher's answers": {"agreement": "argmax_agreement"},
}


def answer_charts(evaluations: Sequence[Record]) -> list[str]:
    """Return the charts over all data sources, or an empty list with fewer than two of them."""
    scores = [(item.get("step"), over_all_sources(item["data"])) for item in evaluations]
    measured = [(step, values) for step, values in scores if isinstance(values, dict) and "perplexity" in values]
    if len(measured) < 2:
        return []
    return [
        line_chart(title, {line: _curve(measured, metric) for line, metric in lines.items()})
        for title, lines in CHARTS.items()
    ]


def _curve(measured: Sequence[tuple[Any, Record]], metric: str) -> list[Point]:
    return [(as_float(step), as_float(values[metric])) for step, values in measured if metric in values]
