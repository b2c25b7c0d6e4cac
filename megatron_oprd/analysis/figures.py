"""Draw the figures of an analysis as SVG files, from the content of analysis.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_oprd.report.charts import (
    Point,
    curve_mark,
    dot_mark,
    escape,
    line_mark,
    scale,
    stroke,
    svg_file,
    text_mark,
    ticks,
)

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 64
LEGEND_COLUMNS = 3
COLORS = {"before": "#f79009", "after": "#1570ef", "drift": "#12b76a"}


def draw_figures(analysis: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures by file name."""
    names = [name for name in ("before", "after") if name in analysis["positions"]]
    by_layer = {name: analysis["positions"][name] for name in names}
    figures = {
        "cosine.svg": line_plot(
            "Cosine of student and teacher states by layer",
            {name: _by_layer(layers, "cosine") for name, layers in by_layer.items()},
            "layer",
        ),
        "error.svg": line_plot(
            "Relative error |h_S - h_T| / |h_T| by layer",
            {name: _by_layer(layers, "relative_error") for name, layers in by_layer.items()},
            "layer",
        ),
        "rank.svg": line_plot(
            "Part of the difference in its leading directions, mean over layers",
            {name: _mean_curve(analysis["directions"], name) for name in ("before", "after", "drift")},
            "number of directions",
            x_text=lambda x: f"{2**x:g}",
        ),
        "gradients.svg": bar_plot(
            "Gradient noise: rollouts for a gradient as long as its error",
            {item["objective"]: item["noise"] for item in analysis["gradients"]},
        ),
    }
    for name in names:
        words = {"before": "before", "after": "after" if len(names) > 1 else "now"}[name]
        figures[f"positions-{name}.svg"] = heat_map(
            f"Cosine by layer and position in the response, {words}",
            [[layer["layer"], *layer["cosine_by_position"]] for layer in by_layer[name]],
            analysis["positions"]["first_positions"],
        )
    directions = [layer["directions"] for layer in analysis["directions"] if "directions" in layer]
    if directions:
        lines = {"after": _mean_of(directions, "left"), "drift": _mean_of(directions, "drift_share")}
        title = "Leading directions of the difference: part that is left, part of the drift"
        figures["drift.svg"] = line_plot(
            title, lines, "direction", names={"after": "left", "drift": "part of the drift"}
        )
    return {name: text for name, text in figures.items() if text}


def line_plot(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    *,
    x_text: Callable[[float], str] | None = None,
    names: Mapping[str, str] | None = None,
) -> str:
    """Return a plot with one line for each name, or an empty string without points.

    Args:
        lines: points (x, y) by name.
        x_text: a function that returns the label of a tick; None: the number.
        names: words of the legend where they differ from the names of the lines.
    """
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_range, y_ticks = (min(xs), max(xs)), ticks(min(ys), max(ys), 4)
    y_range = (y_ticks[0], y_ticks[-1])
    legend_rows = -(-len(lines) // LEGEND_COLUMNS)
    marks = [text_mark(LEFT, 20, title, "start", bold=True)]
    for y in y_ticks:
        height = scale(y, y_range, HEIGHT - BOTTOM, TOP)
        marks.append(line_mark((LEFT, height), (WIDTH - RIGHT, height), stroke()))
        marks.append(text_mark(LEFT - 8, height + 4, f"{y:.4g}", "end"))
    for x in ticks(*x_range, 8, integers=True):
        if x_range[0] <= x <= x_range[1]:
            text = f"{x:g}" if x_text is None else x_text(x)
            marks.append(text_mark(scale(x, x_range, LEFT, WIDTH - RIGHT), HEIGHT - BOTTOM + 16, text, "middle"))
    marks.append(text_mark(WIDTH - RIGHT, HEIGHT - BOTTOM + 34, x_label, "end"))
    for place, (name, points) in enumerate(lines.items()):
        color, shown = COLORS.get(name, f"hsl({360 * place / len(lines):.0f} 70% 45%)"), (names or {}).get(name, name)
        placed = [(scale(x, x_range, LEFT, WIDTH - RIGHT), scale(y, y_range, HEIGHT - BOTTOM, TOP)) for x, y in points]
        marks.append(curve_mark(placed, f'fill="none" {stroke(color, 2)}'))
        marks += [
            dot_mark(at, 3, f'fill="{color}"', f"{shown}, {x_label} {x:g}: {y:.4g}")
            for at, (x, y) in zip(placed, points, strict=True)
        ]
        left, low = LEFT + 190 * (place % LEGEND_COLUMNS), HEIGHT - 12 + 18 * (place // LEGEND_COLUMNS)
        marks.append(line_mark((left, low - 4), (left + 20, low - 4), stroke(color, 2)))
        marks.append(text_mark(left + 26, low, shown, "start"))
    return svg_file(WIDTH, HEIGHT + 18 * (legend_rows - 1), title, marks)


def heat_map(title: str, rows: Sequence[Sequence[Any]], columns: Sequence[int]) -> str:
    """Return a map of colours, the lowest row below.

    Args:
        rows: the name of a row, then its values; None is left blank.
        columns: the first position of each column.
    """
    values = [value for row in rows for value in row[1:] if value is not None]
    low, high = min(values), max(values)
    height = TOP + 14 * len(rows) + BOTTOM
    cell_width = (WIDTH - LEFT - RIGHT) / len(columns)
    marks = [text_mark(LEFT, 20, title, "start", bold=True)]
    for number, (name, *cells) in enumerate(reversed(rows)):
        y = TOP + 14 * number
        marks.append(text_mark(LEFT - 8, y + 11, f"{name}", "end"))
        for column, value in enumerate(cells):
            if value is not None:
                x, light = LEFT + cell_width * column, scale(value, (low, high), 25, 95)
                words = f"layer {name}, from token {columns[column]}: {value:.4g}"
                marks.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{cell_width:.1f}" height="14" fill="hsl(215 70% {light:.0f}%)">'
                    f"<title>{escape(words)}</title></rect>"
                )
    for column in range(0, len(columns), max(len(columns) // 8, 1)):
        x = LEFT + cell_width * (column + 0.5)
        marks.append(text_mark(x, height - BOTTOM + 16, str(columns[column]), "middle"))
    marks.append(text_mark(WIDTH - RIGHT, height - BOTTOM + 34, "first token of the column", "end"))
    marks.append(text_mark(LEFT, height - 12, f"dark {low:.4g}, light {high:.4g}; rows are layers", "start"))
    return svg_file(WIDTH, height, title, marks)


def bar_plot(title: str, bars: Mapping[str, float | None]) -> str:
    """Return horizontal bars on a logarithmic scale, or an empty string without a positive value."""
    values = {name: value for name, value in bars.items() if value}
    if not values:
        return ""
    powers = [math.log10(value) for value in values.values()]
    low, high = math.floor(min(powers) - 0.01), math.ceil(max(powers))
    left, height = 140, TOP + 30 * len(values) + 40
    marks = [text_mark(16, 20, title, "start", bold=True)]
    for power in range(low, high + 1):
        x = scale(power, (low, high), left, WIDTH - RIGHT - 60)
        marks.append(line_mark((x, TOP), (x, height - 36), stroke()))
        marks.append(text_mark(x, height - 18, f"{10.0**power:g}", "middle"))
    for number, (name, value) in enumerate(values.items()):
        y, end = TOP + 30 * number + 5, scale(math.log10(value), (low, high), left, WIDTH - RIGHT - 60)
        marks.append(text_mark(left - 8, y + 15, name, "end"))
        marks.append(f'<rect x="{left}" y="{y}" width="{end - left:.1f}" height="20" fill="{COLORS["after"]}"/>')
        marks.append(text_mark(end + 6, y + 15, f"{value:.3g}", "start"))
    return svg_file(WIDTH, height, title, marks)


def _by_layer(layers: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [(float(layer["layer"]), layer[name]) for layer in layers if layer[name] is not None]


def _mean_curve(layers: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    """Return (log2 of the rank, mean over layers of the explained part)."""
    curves = [layer[name] for layer in layers if name in layer and layer[name]["ranks"]]
    if not curves:
        return []
    means = [sum(column) / len(curves) for column in zip(*(curve["explained"] for curve in curves), strict=True)]
    return [(math.log2(rank), mean) for rank, mean in zip(curves[0]["ranks"], means, strict=True)]


def _mean_of(layers: Sequence[Sequence[Mapping[str, float]]], name: str) -> list[Point]:
    columns = zip(*layers, strict=True)
    return [
        (float(number), sum(one[name] for one in column) / len(layers))
        for number, column in enumerate(columns, start=1)
    ]
