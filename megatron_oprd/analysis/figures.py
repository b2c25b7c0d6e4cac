"""Draw the figures of an analysis as SVG files, from the content of analysis.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_oprd.report.analysis_data import line_figures, map_figures
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
from megatron_oprd.report.heat_map import Cells

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 40, 64
LEGEND_COLUMNS = 2
ROW_HEIGHT = 14
COLORS = {"before": "#f79009", "after": "#1570ef", "drift": "#12b76a"}  # other lines have colours by their number


def draw_figures(analysis: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures by file name."""
    noise = {item["objective"]: item["noise"] for item in analysis["gradients"]}
    figures = {
        **{one.name: line_plot(one.title, one.lines, one.x_label) for one in line_figures(analysis)},
        **{one.name: position_map(one.title, one.cells) for one in map_figures(analysis)},
        "gradients": bar_plot("Gradient noise: rollouts for a gradient as long as its error", noise),
    }
    return {f"{name}.svg": text for name, text in figures.items() if text}


def line_plot(title: str, lines: Mapping[str, Sequence[Point]], x_label: str) -> str:
    """Return a plot with one line for each name, or an empty string without points."""
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
            marks.append(text_mark(scale(x, x_range, LEFT, WIDTH - RIGHT), HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    marks.append(text_mark(WIDTH - RIGHT, HEIGHT - BOTTOM + 34, x_label, "end"))
    for place, (name, points) in enumerate(lines.items()):
        color = COLORS.get(name, f"hsl({360 * place / len(lines):.0f} 70% 45%)")
        placed = [(scale(x, x_range, LEFT, WIDTH - RIGHT), scale(y, y_range, HEIGHT - BOTTOM, TOP)) for x, y in points]
        marks.append(curve_mark(placed, f'fill="none" {stroke(color, 2)}'))
        marks += [
            dot_mark(at, 3, f'fill="{color}"', f"{name}, {x_label} {x:g}: {y:.4g}")
            for at, (x, y) in zip(placed, points, strict=True)
        ]
        left, low = LEFT + 280 * (place % LEGEND_COLUMNS), HEIGHT - 12 + 18 * (place // LEGEND_COLUMNS)
        marks.append(line_mark((left, low - 4), (left + 20, low - 4), stroke(color, 2)))
        marks.append(text_mark(left + 26, low, name, "start"))
    return svg_file(WIDTH, HEIGHT + 18 * (legend_rows - 1), title, marks)


def position_map(title: str, cells: Cells) -> str:
    """Return a map of colours, the lowest row below. A cell of NaN is left blank."""
    known = [value for row in cells.values for value in row if math.isfinite(value)]
    low, high = min(known), max(known)
    height = TOP + ROW_HEIGHT * len(cells.rows) + BOTTOM
    cell_width = (WIDTH - LEFT - RIGHT) / len(cells.columns)
    marks = [text_mark(LEFT, 20, title, "start", bold=True)]
    for number, (row, values) in enumerate(zip(reversed(cells.rows), reversed(cells.values), strict=True)):
        y = TOP + ROW_HEIGHT * number
        marks.append(text_mark(LEFT - 8, y + 11, f"{row:g}", "end"))
        for column, value in enumerate(values):
            if math.isfinite(value):
                x, light = LEFT + cell_width * column, scale(value, (low, high), 25, 95)
                size = f'x="{x:.1f}" y="{y}" width="{cell_width:.1f}" height="{ROW_HEIGHT}"'
                words = f"{cells.row_label} {row:g}, {cells.column_label} {cells.columns[column]:g}: {value:.4g}"
                color = f"hsl(215 70% {light:.0f}%)"
                marks.append(f'<rect {size} fill="{color}"><title>{escape(words)}</title></rect>')
    for column in range(0, len(cells.columns), max(len(cells.columns) // 8, 1)):
        x = LEFT + cell_width * (column + 0.5)
        marks.append(text_mark(x, height - BOTTOM + 16, f"{cells.columns[column]:g}", "middle"))
    marks.append(text_mark(WIDTH - RIGHT, height - BOTTOM + 34, f"{cells.column_label} of the column", "end"))
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
