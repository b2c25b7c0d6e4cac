"""The lines and maps of an analysis, from the content of analysis.json: for the report page and for the SVG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_oprd.evaluation.records import Point
from megatron_oprd.report.heat_map import Cells


@dataclass(frozen=True)
class Lines:
    """A figure with a line for each name."""

    name: str  # of the SVG file, without its ending
    title: str
    x_label: str
    lines: Mapping[str, Sequence[Point]]  # an empty line is not drawn


@dataclass(frozen=True)
class Map:
    """A figure with a colour for each layer and position."""

    name: str  # of the SVG file, without its ending
    title: str
    cells: Cells


def line_figures(found: Mapping[str, Any]) -> list[Lines]:
    """Return the figures with lines. Raises KeyError or TypeError for a file of another form."""
    states, directions = _states(found), found["directions"]
    leading = [layer["directions"] for layer in directions if "directions" in layer]
    left = {"left": _mean_of(leading, "left"), "part of the drift": _mean_of(leading, "drift_share")}
    curves = {name: _mean_curve(directions, name) for name in ("before", "after", "drift")}
    return [
        Lines("cosine", "Cosine of student and teacher states", "layer", _by_layer(states, "cosine")),
        Lines("error", "Relative error |h_S - h_T| / |h_T|", "layer", _by_layer(states, "relative_error")),
        Lines("rank", "Part of h_S - h_T in its leading directions, mean over layers", "directions, log2", curves),
        Lines("drift", "What is left in the leading directions, mean over layers", "direction", left),
    ]


def map_figures(found: Mapping[str, Any]) -> list[Map]:
    """Return the maps of layer and position. Raises KeyError or TypeError for a file of another form."""
    states = _states(found)
    figures = []
    for name, layers in states.items():
        words = name if len(states) > 1 else "now"
        values = [[math.nan if one is None else one for one in layer["cosine_by_position"]] for layer in layers]
        columns = found["positions"]["first_positions"]
        cells = Cells([layer["layer"] for layer in layers], columns, values, "layer", "first token")
        figures.append(Map(f"positions-{name}", f"Cosine by layer and position in the response, {words}", cells))
    return figures


def _states(found: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {name: found["positions"][name] for name in ("before", "after") if name in found["positions"]}


def _by_layer(states: Mapping[str, Sequence[Mapping[str, Any]]], value: str) -> dict[str, list[Point]]:
    return {
        name: [(float(layer["layer"]), layer[value]) for layer in layers if layer[value] is not None]
        for name, layers in states.items()
    }


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
