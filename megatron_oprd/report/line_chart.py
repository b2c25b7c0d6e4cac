"""Line charts of a report page, as SVG with the values beside it from which `page.js` shows and smooths them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

from megatron_oprd.evaluation.records import Point
from megatron_oprd.report.charts import curve_mark, dot_mark, escape, line_mark, scale, text_mark, thin, ticks
from megatron_oprd.report.page import number

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 10, 36
MOST_POINTS = 2400  # of all lines of a chart: a run of so many steps is drawn completely
LEAST_POINTS = 60  # of a line, however many lines there are
MOST_COLORS = 8  # `.c0` to `.c7` in page.css


def line_chart(title: str, series: Mapping[str, Sequence[Point]], *, x_label: str = "step", smooth: bool = True) -> str:
    """Return a card with one line per series over a common x axis, or an empty string without any finite point.

    Points that are not finite are left out. Of a long line, the lowest and the highest point of each part are kept.

    Args:
        title: heading of the card.
        series: points by the name of their line, each line sorted by x.
        x_label: name of the x axis.
        smooth: True if the reader may smooth the lines.
    """
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    each = max(MOST_POINTS // len(lines), LEAST_POINTS)
    lines = {name: thin_keeping_extremes(points, each) for name, points in lines.items()}
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_range, y_ticks = (min(xs), max(xs)), ticks(min(ys), max(ys), 4)
    y_range = (y_ticks[0], y_ticks[-1])
    colors = [_color(place, len(lines)) for place in range(len(lines))]
    marks = _axes(x_range, y_ticks, x_label)
    for points, color in zip(lines.values(), colors, strict=True):
        marks += _line(points, x_range, y_range, color)
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
    values = escape(_values(lines, {"x_label": x_label, "smooth": smooth, "x": x_range, "y": y_range}))
    return (
        f'<div class="card"><h3>{escape(title)}</h3><figure class="chart" data-lines="{values}">{drawing}</figure>'
        f"{_legend(list(lines), colors)}</div>"
    )


def thin_keeping_extremes(points: Sequence[Point], count: int) -> list[Point]:
    """Return at most `count` (at least 4) points: both ends, and the lowest and highest of each equal part between."""
    if len(points) <= count:
        return list(points)
    parts = (count - 2) // 2
    inner = points[1:-1]
    bounds = [round(i * len(inner) / parts) for i in range(parts + 1)]
    kept = [points[0]]
    for begin, end in pairwise(bounds):
        part = inner[begin:end]
        kept += sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _values(lines: Mapping[str, Sequence[Point]], axes: Mapping[str, object]) -> str:
    """Return the values of a chart as JSON. A line without `x` has that of the first line."""
    first = [x for x, _ in next(iter(lines.values()))]
    encoded = []
    for name, points in lines.items():
        line: dict[str, object] = {"name": name if len(lines) > 1 else "", "y": [_short(y) for _, y in points]}
        xs = [x for x, _ in points]
        if not encoded or xs != first:
            line["x"] = [_short(x, 8) for x in xs]
        encoded.append(line)
    frame = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
    return json.dumps({**axes, "frame": frame, "lines": encoded}, separators=(",", ":"), allow_nan=False)


def _short(value: float, digits: int = 5) -> float | int:
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _axes(x_range: Point, y_ticks: Sequence[float], x_label: str) -> list[str]:
    marks = []
    for y in y_ticks:
        height = scale(y, (y_ticks[0], y_ticks[-1]), HEIGHT - BOTTOM, TOP)
        marks.append(line_mark((LEFT, height), (WIDTH - RIGHT, height), 'class="axis"'))
        marks.append(text_mark(LEFT - 8, height + 4, number(y), "end"))
    for x in ticks(*x_range, 6, integers=True):
        if x_range[0] <= x <= x_range[1]:
            marks.append(text_mark(scale(x, x_range, LEFT, WIDTH - RIGHT), HEIGHT - BOTTOM + 16, f"{x:g}", "middle"))
    return [*marks, text_mark(WIDTH - RIGHT, HEIGHT - 4, x_label, "end")]


def _line(points: Sequence[Point], x_range: Point, y_range: Point, color: str) -> list[str]:
    placed = [(scale(x, x_range, LEFT, WIDTH - RIGHT), scale(y, y_range, HEIGHT - BOTTOM, TOP)) for x, y in points]
    is_class = color.startswith("c")
    css, style = (f" {color}", "") if is_class else ("", f' style="stroke:{color}"')
    marks = [curve_mark(placed, f'class="series{css}"{style}')]
    if len(placed) <= 12:  # a single point makes no line, and a few are worth seeing
        fill = f"var(--{color})" if is_class else color
        marks += [dot_mark(point, 3, f'style="fill:{fill}"') for point in placed]
    return marks


def _legend(names: Sequence[str], colors: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    # Colours of many lines run evenly from the first to the last, so a few entries explain all.
    shown = thin(range(len(names)), MOST_COLORS if len(names) <= MOST_COLORS else 5)
    return f'<div class="legend">{"".join(f"<span>{swatch(colors[i])}{escape(names[i])}</span>" for i in shown)}</div>'


def swatch(color: str) -> str:
    """Return a short stroke in the colour of a line: `c0` to `c7` of page.css, or a CSS colour."""
    if color.startswith("c"):
        return f'<span class="swatch b{color[1:]}"></span>'
    return f'<span class="swatch" style="background:{color}"></span>'


def _color(place: int, count: int) -> str:
    """Return a class of page.css, or for many lines a colour from blue (first) to orange (last)."""
    if count <= MOST_COLORS:
        return f"c{place}"
    return f"hsl({215 + 180 * place / (count - 1):.0f} 75% 55%)"
