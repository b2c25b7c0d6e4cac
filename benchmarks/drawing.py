"""The few marks that the benchmarks' plots are made of, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

INK, GRID = "#344054", "#d0d5dd"


def svg(width: int, height: int, title: str, marks: Sequence[str]) -> str:
    """A picture with its marks, one string each, on white."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = f'font-family="system-ui,sans-serif" font-size="12" role="img" fill="{INK}"'
    background = f'<title>{title}</title><rect width="{width}" height="{height}" fill="#fff"/>'
    return "\n".join([f"{head} {style}>", background, *marks, "</svg>", ""])


def text_mark(x: float, y: float, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{text}</text>'


def line_mark(
    x1: float, y1: float, x2: float, y2: float, color: str = GRID, width: float = 1, dashes: str = "none"
) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{color}" stroke-width="{width}" stroke-dasharray="{dashes}"/>'
