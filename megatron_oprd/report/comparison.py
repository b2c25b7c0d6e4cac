"""Show several runs beside each other on one page: results, settings, curves and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_oprd.evaluation.records import Point, as_float, curve, ordered
from megatron_oprd.evaluation.scores import over_all_sources
from megatron_oprd.report.answers_section import last_answers, side_by_side, teacher_column
from megatron_oprd.report.charts import escape
from megatron_oprd.report.curves_section import SMOOTHING
from megatron_oprd.report.headline import speed
from megatron_oprd.report.line_chart import MOST_COLORS, line_chart, swatch
from megatron_oprd.report.page import NO_VALUE, Raw, navigation, number, section, table
from megatron_oprd.report.run_files import RunFiles
from megatron_oprd.report.scores_section import best_marked
from megatron_oprd.report.settings_section import as_text, changed
from megatron_oprd.report.tiles import EVALUATION_TILES, STEP_TILES
from megatron_oprd.runtime.readable import duration

AXES = (
    '<div class="controls"><span>Curves by '
    '<label><input type="radio" name="axis" value="step" checked> step</label> '
    '<label><input type="radio" name="axis" value="seconds"> seconds of training</label></span></div>'
)
STEP_CURVES = {**STEP_TILES, "rep/mse": "squared error of the states", "grad_norm": "gradient norm, before clipping"}
RESULTS_NOTE = "Scores are over all data sources; the best one of each metric is green."
# Settings that differ between all runs and explain nothing.
NOT_COMPARED = {"train.run_dir"}


def comparison_page(runs: Sequence[RunFiles]) -> str:
    """Return the content of the page for at least two runs."""
    names = _names(runs)
    answered = (last_answers(run, name) for run, name in zip(runs, names, strict=True))
    columns = [column for column in answered if column is not None]
    sections = {
        "Results": section("Results", _results(runs, names), RESULTS_NOTE),
        "Settings": section("Settings", _settings(runs, names), "Keys whose values differ between the runs."),
        "Curves": section("Curves", _curves(runs, names)),
        "Answers": side_by_side("Answers", [*columns, *teacher_column(runs[0])]),
    }
    return f"<h1>Comparison of {len(runs)} runs</h1>{navigation(sections)}{''.join(sections.values())}"


def _names(runs: Sequence[RunFiles]) -> list[str]:
    """Return a different name for each run: the end of its path, as long as needed."""
    parts = [run.run_dir.resolve().parts for run in runs]
    length = next(n for n in range(1, 100) if len({p[-n:] for p in parts}) == len(parts) or n == 99)
    return ["/".join(p[-length:]) for p in parts]


def _results(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return a table with a column for each run and a row for each number."""
    scores = [over_all_sources(run.evaluations[-1]["data"]) if run.evaluations else {} for run in runs]
    last = [run.metrics[-1] if run.metrics else {} for run in runs]
    rows: list[list[object]] = [
        ["steps", *(number(row.get("step")) for row in last)],
        ["time of training", *(duration(run.seconds) if run.seconds else NO_VALUE for run in runs)],
        ["response tokens/s", *(number(speed(run)) for run in runs)],
    ]
    metrics = [name for name in ordered(scores) if "/layer_" not in name]
    rows += [["last evaluation"]] if metrics else []
    rows += [[metric, *best_marked(metric, [one.get(metric) for one in scores])] for metric in metrics]
    measured = [key for key in STEP_TILES if any(key in row for row in last)]
    rows += [["last step"]] if measured else []
    rows += [[key, *(number(row.get(key)) for row in last)] for key in measured]
    heads = [Raw(f"{swatch(f'c{place % MOST_COLORS}')}{escape(name)}") for place, name in enumerate(names)]
    return table(["", *heads], rows)


def _settings(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    values = [changed(run) for run in runs]
    differing = [
        key
        for key in ordered(values)
        if key not in NOT_COMPARED and len({as_text(one.get(key, NO_VALUE)) for one in values}) > 1
    ]
    rows = [[key, *(as_text(one[key]) if key in one else "default" for one in values)] for key in differing]
    return table(["key", *names], rows, text_columns=["key", *names]) if rows else "<p>The settings are the same.</p>"


def _curves(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    by_axis = {"step": lambda run: float, "seconds": _elapsed}
    grids = []
    for axis, clock in by_axis.items():
        drawn = "".join(_charts(runs, names, axis, clock))
        grids.append(f'<div class="grid" data-axis="{axis}">{drawn}</div>')
    return SMOOTHING + AXES + "".join(grids)


def _charts(
    runs: Sequence[RunFiles], names: Sequence[str], axis: str, clock: Callable[[RunFiles], Callable[[float], float]]
) -> list[str]:
    label = "step" if axis == "step" else "s"
    clocks = [clock(run) for run in runs]
    charts = []
    found = [over_all_sources(item["data"]) for run in runs for item in run.evaluations]
    graded = [name for name in ordered(found) if name.startswith("avg@")]
    for metric, title in ({name: f"right answers, {name}" for name in graded} | EVALUATION_TILES).items():
        lines = {
            name: [
                (at(as_float(item.get("step"))), as_float(over_all_sources(item["data"]).get(metric)))
                for item in run.evaluations
            ]
            for run, name, at in zip(runs, names, clocks, strict=True)
        }
        charts.append(line_chart(title, lines, x_label=label))
    for metric, title in STEP_CURVES.items():
        lines = {
            name: [(at(step), value) for step, value in curve(run.metrics, metric)]
            for run, name, at in zip(runs, names, clocks, strict=True)
        }
        charts.append(line_chart(title, lines, x_label=label))
    return charts


def _elapsed(run: RunFiles) -> Callable[[float], float]:
    """Return a function from a step to the seconds of training at its end."""
    times: dict[float, float] = {0.0: 0.0}
    total = 0.0
    for step, value in _step_times(run):
        total += value
        times[step] = total
    return lambda step: times.get(step, float("nan"))


def _step_times(run: RunFiles) -> list[Point]:
    return [(step, max(value, 0.0)) for step, value in curve(run.metrics, "time/step") if value == value]
