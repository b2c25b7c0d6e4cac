"""Marks, scales and ticks of charts as SVG text: for the report page and for the plots of `benchmarks/`."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from megatron_oprd.evaluation.records import Point

INK, GRID = "#344054", "#d0d5dd"


def escape(value: object) -> str:
    """Return text that is safe in HTML and SVG, quotes included."""
    return html.escape(str(value), quote=True)


def svg_file(width: int, height: int, title: str, marks: Sequence[str]) -> str:
    """Return a picture of its own, on white, with one mark per string."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = f'font-family="system-ui,sans-serif" font-size="12" role="img" fill="{INK}"'
    background = f'<title>{escape(title)}</title><rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([f"{head} {style}>", background, *marks, "</svg>", ""])


def stroke(color: str = GRID, width: float = 1, dashes: str = "none") -> str:
    """Return the attributes of a line for a picture without a style sheet."""
    return f'stroke="{color}" stroke-width="{width}" stroke-dasharray="{dashes}"'


def text_mark(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def line_mark(start: Point, end: Point, style: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<line {style} x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def curve_mark(points: Sequence[Point], style: str) -> str:
    """Return a line through the points; `style` has its attributes."""
    return f'<polyline {style} points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>'


def dot_mark(point: Point, radius: float, style: str, tooltip: str = "") -> str:
    """Return a dot; a browser shows `tooltip` when the pointer rests on it."""
    shape = f'<circle {style} cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="{radius:g}"'
    return f"{shape}><title>{escape(tooltip)}</title></circle>" if tooltip else f"{shape}/>"


def scale(value: float, domain: Point, start: float, end: float) -> float:
    """Map `value` linearly from `domain` (low, high) to the pixels from `start` to `end`."""
    low, high = domain
    return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)


def ticks(low: float, high: float, count: int, *, integers: bool = False) -> list[float]:
    """Return about `count` round values from just below `low` to just above `high`."""
    if high == low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * 0.999)
    step = max(1.0, step) if integers else step
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)  # 1.00000001 is 1
    return [i * step for i in range(first, last + 1)]


def thin(points: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the points, evenly spaced, with the first and the last."""
    if len(points) <= count:
        return list(points)
    return [points[round(i * (len(points) - 1) / (count - 1))] for i in range(count)]
