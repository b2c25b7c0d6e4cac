"""Heat maps of a report page: a value for each row and column, as SVG with the values for `page.js` beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.report.charts import escape, text_mark, ticks
from megatron_oprd.report.page import NO_VALUE, number

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 74, 10, 36
MOST_COLUMNS, MOST_ROWS = 120, 128
SHADES = 24
LOWEST_SHARE = 0.02  # of the values: so few outliers share the lowest colour, and do not flatten the others
# From low to high: dark blue over green to yellow, in equal steps of brightness (Viridis), without red beside green.
_COLORS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_SCALE_LEFT = WIDTH - RIGHT + 12
_SCALE_WIDTH = 12


@dataclass(frozen=True)
class Cells:
    """The values of a heat map. A cell that was not measured is NaN."""

    rows: Sequence[float]  # numbers of the rows, from the bottom
    columns: Sequence[float]  # numbers of the columns, from the left
    values: Sequence[Sequence[float]]  # [rows][columns]
    row_label: str
    column_label: str


def heat_map(title: str, cells: Cells, limits: tuple[float, float] | None = None) -> str:
    """Return a card with the map, or an empty string without two columns that have a finite value.

    Many rows or columns are thinned: neighbouring ones share a cell with the mean of their values.
    `limits`: the values of the lowest and the highest colour; None: those of the map.
    """
    cells = _thinned(cells)
    limits = limits or value_limits([cells])
    if len(cells.columns) < 2 or limits is None:
        return ""
    low, high = limits
    marks = [*_shapes(cells, low, high), *_labels(cells), *_scale(low, high)]
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
    return (
        f'<div class="card"><h3>{escape(title)}</h3>'
        f'<figure class="chart" data-cells="{escape(_json(cells))}">{drawing}</figure></div>'
    )


def value_limits(maps: Sequence[Cells]) -> tuple[float, float] | None:
    """Return the values of the lowest and the highest colour for maps that share their colours, or None without any."""
    known = sorted(value for cells in maps for row in cells.values for value in row if math.isfinite(value))
    return (known[int(LOWEST_SHARE * len(known))], known[-1]) if known else None


def _thinned(cells: Cells) -> Cells:
    columns, rows = _parts(len(cells.columns), MOST_COLUMNS), _parts(len(cells.rows), MOST_ROWS)
    values = [
        [_mean([cells.values[i][j] for i in range(*row) for j in range(*column)]) for column in columns] for row in rows
    ]
    return Cells(
        [cells.rows[begin] for begin, _ in rows],
        [cells.columns[begin] for begin, _ in columns],
        values,
        cells.row_label,
        cells.column_label,
    )


def _parts(total: int, most: int) -> list[tuple[int, int]]:
    """Return the begin and end of at most `most` equal parts."""
    count = min(total, most)
    return [(total * i // count, total * (i + 1) // count) for i in range(count)]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _shapes(cells: Cells, low: float, high: float) -> list[str]:
    """Return one path per shade with all cells of that shade, which is a tenth of the size of one mark per cell."""
    paths: dict[int, list[str]] = {}
    # Rounded edges, which neighbours share, leave no gap between the cells.
    across, up = _edges(LEFT, WIDTH - RIGHT, len(cells.columns)), _edges(HEIGHT - BOTTOM, TOP, len(cells.rows))
    for i, row in enumerate(cells.values):
        for j, value in enumerate(row):
            if math.isfinite(value):
                x, y, width, height = across[j], up[i + 1], across[j + 1] - across[j], up[i] - up[i + 1]
                shape = f"M{x:g} {y:g}h{width:.1f}v{height:.1f}h-{width:.1f}z"
                paths.setdefault(_shade(value, low, high), []).append(shape)
    crisp = 'shape-rendering="crispEdges"'
    return [f'<path fill="{_fill(shade)}" {crisp} d="{"".join(d)}"/>' for shade, d in sorted(paths.items())]


def _edges(start: float, end: float, count: int) -> list[float]:
    return [round(start + (end - start) * i / count, 1) for i in range(count + 1)]


def _shade(value: float, low: float, high: float) -> int:
    share = 1.0 if high <= low else min(max((value - low) / (high - low), 0.0), 1.0)
    return round(share * (SHADES - 1))


def _fill(shade: int) -> str:
    place = shade / (SHADES - 1) * (len(_COLORS) - 1)
    first = min(int(place), len(_COLORS) - 2)
    pair = zip(_COLORS[first], _COLORS[first + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02x}" for a, b in pair)


def _labels(cells: Cells) -> list[str]:
    height = (HEIGHT - BOTTOM - TOP) / len(cells.rows)
    width = (WIDTH - RIGHT - LEFT) / len(cells.columns)
    marks = [
        text_mark(LEFT - 8, HEIGHT - BOTTOM - (i + 0.5) * height + 4, f"{label:g}", "end")
        for i, label in _round_ones(cells.rows)
    ]
    marks += [
        text_mark(LEFT + (j + 0.5) * width, HEIGHT - BOTTOM + 16, f"{label:g}", "middle")
        for j, label in _round_ones(cells.columns)
    ]
    marks.append(text_mark(WIDTH - RIGHT, HEIGHT - 4, cells.column_label, "end"))
    return [*marks, text_mark(LEFT - 8, HEIGHT - 4, cells.row_label, "end")]


def _round_ones(numbers: Sequence[float]) -> list[tuple[int, float]]:
    """Return the labels of an axis with the places of their cells: the first number, and round ones."""
    wanted = [value for value in ticks(numbers[0], numbers[-1], 6, integers=True) if numbers[0] < value <= numbers[-1]]
    places = {max(i for i, first in enumerate(numbers) if first <= value): value for value in wanted}
    return sorted({0: numbers[0], **{place: value for place, value in places.items() if place}}.items())


def _scale(low: float, high: float) -> list[str]:
    height = (HEIGHT - BOTTOM - TOP) / SHADES
    marks = [
        f'<rect x="{_SCALE_LEFT}" y="{HEIGHT - BOTTOM - (shade + 1) * height:.1f}" width="{_SCALE_WIDTH}" '
        f'height="{height + 0.5:.1f}" fill="{_fill(shade)}"/>'
        for shade in range(SHADES)
    ]
    for value, y in ((high, TOP + 10), (low, HEIGHT - BOTTOM)):
        marks.append(text_mark(_SCALE_LEFT + _SCALE_WIDTH + 5, y, number(float(f"{value:.3g}")), "start"))
    return marks


def _json(cells: Cells) -> str:
    values = [[None if number(value) == NO_VALUE else float(f"{value:.4g}") for value in row] for row in cells.values]
    content = {
        "rows": list(cells.rows),
        "columns": list(cells.columns),
        "values": values,
        "row_label": cells.row_label,
        "column_label": cells.column_label,
        "frame": [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM],
    }
    return json.dumps(content, separators=(",", ":"), allow_nan=False)
