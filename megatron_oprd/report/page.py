"""The parts of a report page: escaped HTML, tables and line charts as inline SVG, without scripts or network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_oprd.evaluation.records import Point
from megatron_oprd.report.charts import (
    curve_mark,
    dot_mark,
    escape,
    line_mark,
    scale,
    text_mark,
    thin,
    ticks,
)

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 36
NO_VALUE = "\u2013"
MAX_POINTS = 300  # per line: more cannot be told apart
MAX_HOVER_POINTS = 1200  # per chart: each is an element of the page

STYLE = """
:root{--bg:#fff;--fg:#1c2330;--muted:#667085;--line:#e4e7ec;--card:#f8f9fb;--accent:#2563eb;--good:#067647;--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--bg:#12151b;--fg:#e6e8ec;--muted:#98a2b3;--line:#2b313c;--card:#191d25;
--accent:#7aa7ff;--good:#47cd89;--bad:#f97066}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:24px 16px 64px;background:var(--bg);color:var(--fg);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.6rem;margin:0 0 4px}h2{font-size:1.15rem;margin:36px 0 10px}h3{font-size:.95rem;margin:0 0 6px}
p{margin:6px 0}.muted{color:var(--muted)}code,pre{font:12.5px/1.5 ui-monospace,Menlo,Consolas,monospace}
code{overflow-wrap:anywhere}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:16px}
.card,details{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px}
details{margin:8px 0}summary{cursor:pointer;overflow-wrap:anywhere}
pre{white-space:pre-wrap;overflow-wrap:anywhere;max-height:420px;overflow:auto;margin:10px 0 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th{color:var(--muted);font-weight:600}th:first-child,td:first-child,td.text,th.text{text-align:left}
.good{color:var(--good)}.bad{color:var(--bad)}.bar{background:var(--accent);height:10px;border-radius:3px;min-width:1px}
td.wide{width:45%}svg{display:block;width:100%;height:auto}svg text{fill:var(--muted);font-size:12px}
.axis{stroke:var(--line);stroke-width:1}.series{fill:none;stroke-width:2;stroke-linejoin:round}
.hit{fill-opacity:0;stroke:none}.hit:hover{fill-opacity:1}
.legend{display:flex;flex-wrap:wrap;gap:4px 14px;font-size:.8rem;color:var(--muted);margin-top:6px}
.state{display:inline-block;padding:3px 12px;border-radius:14px;background:var(--accent);color:var(--bg);
font-weight:600}
@media(max-width:560px){h1{font-size:1.25rem}th,td{padding:5px 4px;font-size:12.5px}
th,td:first-child,td.text{white-space:normal}}
.swatch{display:inline-block;width:12px;height:3px;vertical-align:middle;margin-right:5px}
"""


@dataclass(frozen=True)
class Raw:
    """A table cell whose text is HTML and is not escaped again."""

    html: str
    css_class: str = ""


def number(value: object) -> str:
    """Return a number with four significant digits, or a dash for anything that is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NO_VALUE
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def page(title: str, body: str, refresh: int | None = None) -> str:
    """Return a complete HTML document. A browser loads it again every `refresh` seconds."""
    reload = f'<meta http-equiv="refresh" content="{refresh}">' if refresh is not None else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="color-scheme" '
        f'content="light dark">{reload}<title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{body}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[object]], text_columns: Sequence[str] = ()) -> str:
    """Return a table that scrolls sideways by itself; cells are escaped unless they are Raw."""
    cells = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
    classes = ['class="text"' if name in text_columns else "" for name in head]
    heads = "".join(f"<th {css}>{escape(name)}</th>" for name, css in zip(head, classes, strict=True))
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{cells}</tbody></table></div>'


def details(summary: str, text: str, *, is_open: bool = False) -> str:
    """Return a block of text that unfolds under its summary."""
    return (
        f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
    )


def line_chart(title: str, series: Mapping[str, Sequence[Point]], *, x_label: str = "step") -> str:
    """Return a card with one line per series over a common x axis, or an empty string without any finite point.

    Points that are not finite are left out. Each point shows its value when the pointer rests on it.
    """
    lines = {
        name: thin([p for p in points if all(map(math.isfinite, p))], MAX_POINTS) for name, points in series.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_range, y_ticks = (min(xs), max(xs)), ticks(min(ys), max(ys), 4)
    y_range = (y_ticks[0], y_ticks[-1])
    marks = _axes(x_range, y_ticks, x_label)
    for place, (name, points) in enumerate(lines.items()):
        label = f"{name}, " if len(lines) > 1 else ""
        placed = [(scale(x, x_range, LEFT, WIDTH - RIGHT), scale(y, y_range, HEIGHT - BOTTOM, TOP)) for x, y in points]
        color = _color(place, len(lines))
        marks.append(_line(placed, color))
        tooltips = [f"{label}{x_label} {x:g}: {number(y)}" for x, y in points]
        marks.append(_hover_points(placed, tooltips, color, MAX_HOVER_POINTS // len(lines)))
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
    return f'<div class="card"><h3>{escape(title)}</h3>{drawing}{_legend(list(lines))}</div>'


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


def _line(placed: Sequence[Point], color: str) -> str:
    drawn = curve_mark(placed, f'class="series" stroke="{color}"')
    if len(placed) <= 12:  # a single point makes no line, and a few are worth seeing
        drawn += "".join(dot_mark(point, 3, f'fill="{color}"') for point in placed)
    return drawn


def _hover_points(placed: Sequence[Point], tooltips: Sequence[str], color: str, count: int) -> str:
    shown = thin(list(zip(placed, tooltips, strict=True)), max(count, 2))
    return "".join(dot_mark(point, 5, f'class="hit" fill="{color}"', tooltip) for point, tooltip in shown)


def _legend(names: Sequence[str]) -> str:
    if len(names) == 1:
        return ""
    # Colours run evenly from the first line to the last, so a few entries explain all.
    shown = thin(range(len(names)), 8 if len(names) <= 8 else 5)
    entries = "".join(
        f'<span><span class="swatch" style="background:{_color(i, len(names))}"></span>{escape(names[i])}</span>'
        for i in shown
    )
    return f'<div class="legend">{entries}</div>'


def _color(place: int, count: int) -> str:
    """Return a colour from blue (first line) to orange (last line), readable on light and dark pages."""
    return f"hsl({215 + 180 * place / max(count - 1, 1):.0f} 75% 55%)"


def _cell(value: object) -> str:
    if isinstance(value, Raw):
        return f'<td class="{value.css_class}">{value.html}</td>'
    return f"<td>{escape(value)}</td>"
