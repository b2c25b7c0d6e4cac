"""Show the layers of a run: the cosine of their hidden states by step, and each layer at the start and at the end."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_oprd.evaluation.records import Point, Record, as_float
from megatron_oprd.evaluation.scores import over_all_sources
from megatron_oprd.report.heat_map import Cells, heat_map
from megatron_oprd.report.line_chart import line_chart
from megatron_oprd.report.page import section
from megatron_oprd.report.run_files import RunFiles


def layers_section(run: RunFiles) -> str:
    """Return the heat map of layers and steps, and the layers at the start and at the end."""
    layers = [int(layer) for layer, _ in _by_layer(_union(run.metrics), "rep/cosine")]
    measured = [row for row in run.metrics if _by_layer(row, "rep/cosine")]
    values = [[as_float(row.get(f"rep/cosine/layer_{layer}")) for row in measured] for layer in layers]
    cells = Cells(layers, [row["step"] for row in measured], values, "layer", "step")
    scores = [over_all_sources(item["data"]) | {"step": item.get("step")} for item in run.evaluations]
    cards = [
        heat_map("Cosine by layer and step", cells),
        _ends("Cosine per layer, first and last step", measured, "rep/cosine"),
        _ends("Squared error per layer, first and last step", measured, "rep/mse"),
        _ends("Cosine per layer on the teacher's answers, first and last evaluation", scores, "cosine"),
    ]
    drawn = "".join(cards)
    return section("Layers", f'<div class="grid">{drawn}</div>' if drawn else "", "Layers of the student, from 1.")


def _ends(title: str, rows: Sequence[Record], metric: str) -> str:
    """Return a chart over the layers with a line for the first and the last row that has the metric."""
    measured = [row for row in rows if _by_layer(row, metric)]
    lines = {f"step {row['step']}": _by_layer(row, metric) for row in [*measured[:1], *measured[1:][-1:]]}
    return line_chart(title, lines, x_label="layer", smooth=False)


def _by_layer(row: Record, metric: str) -> list[Point]:
    found = ((re.fullmatch(rf"{metric}/layer_(\d+)", name), value) for name, value in row.items())
    return sorted((float(match[1]), as_float(value)) for match, value in found if match)


def _union(rows: Sequence[Record]) -> Record:
    return {key: value for row in rows for key, value in row.items()}
