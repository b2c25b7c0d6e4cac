"""The table and the plots of docs/real_model.md, from the runs of real_model.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pages import table_lines
from megatron_oprd.analysis.figures import line_plot

# metric of an evaluation -> name in the table
METRICS = {
    "perplexity": "perplexity",
    "forward_kl": "KL(teacher, student)",
    "reverse_kl": "KL(student, teacher)",
    "argmax_agreement": "most likely token in common",
}
NAMES = {
    "both": "hidden states and full KL",
    "hidden_states": "hidden states",
    "hidden_next_input": "hidden states, next-input pairs",
    "hidden_proportional": "hidden states, proportional pairs",
    "hidden_last": "hidden states, last layer only",
    "hidden_off_policy": "hidden states, teacher's answers",
    "full_kl": "full KL",
    "top16": "top 16, as the authors",
}


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of the table: a row for the start model, then one for each run."""
    head = ["trained on", "learning rate", "steps", "seed", *METRICS.values(), "gap closed", "CPU s per step"]
    rows: list[list[Any]] = [["nothing: the pruned model", "", "", "", *_figures(runs[0]["before"]), "", ""]]
    for run in runs:
        seconds = run.get("cpu_seconds_per_step")
        rows.append(
            [
                NAMES[run["method"]],
                f"{run['learning_rate']:g}",
                run["steps"],
                run["seed"],
                *_figures(run["after"]),
                f"{gap_closed(run):.0%}",
                f"{seconds:.1f}" if seconds else "",
            ]
        )
    return table_lines(head, rows)


def gradient_table(analysis: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of gradients, from the analysis of a run."""
    head = ["objective", "noise, rollouts", "variance", "within a prompt", "signal", "update s", "teacher's states MB"]
    rows = [
        [
            item["objective"],
            f"{item['noise']:.1f}" if item["noise"] else "no signal",
            f"{item['variance']:.4g}",
            f"{item['variance_within_prompts']:.4g}",
            f"{item['signal']:.3g}",
            f"{item['cost']['student_seconds']:.1f}",
            f"{item['cost']['target_bytes'] / 1e6:.1f}",
        ]
        for item in analysis["gradients"]
    ]
    return table_lines(head, rows)


def gap_closed(run: Mapping[str, Any]) -> float:
    """Return the part of the perplexity lost by pruning that the training brought back."""
    gap, rest = (run[name]["perplexity"] - run[name]["teacher_perplexity"] for name in ("before", "after"))
    return float(1 - rest / gap)


def plot_over_steps(runs: Sequence[dict[str, Any]]) -> str:
    """Return a plot of the perplexity on the teacher's answers by step, the mean over seeds of each method."""
    return _plot(runs, "step", {_line(run): 1.0 for run in runs})


def plot_over_seconds(runs: Sequence[dict[str, Any]]) -> str:
    """Return the same plot by seconds of CPU time, of the methods whose time was measured."""
    seconds = {_line(run): run["cpu_seconds_per_step"] for run in runs if run.get("cpu_seconds_per_step")}
    return _plot([run for run in runs if _line(run) in seconds], "seconds of CPU time", seconds)


def _plot(runs: Sequence[dict[str, Any]], x_label: str, scales: Mapping[str, float]) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in dict.fromkeys(map(_line, runs)):
        curves = [run["evaluations"] for run in runs if _line(run) == name]
        by_step: dict[int, list[float]] = {}
        for point in (point for curve in curves for point in curve):
            by_step.setdefault(point["step"], []).append(point["perplexity"])
        common = [(step, values) for step, values in sorted(by_step.items()) if len(values) == len(curves)]
        lines[name] = [(step * scales[name], sum(values) / len(values)) for step, values in common]
    return line_plot(f"Perplexity of the teacher's held-out answers by {x_label}", lines, x_label)


def _line(run: Mapping[str, Any]) -> str:
    """Return the name of a run's line; runs that differ in the seed alone share it."""
    rate = "" if run["learning_rate"] == 2e-4 else f", {run['learning_rate']:g}"
    return NAMES[run["method"]] + rate + ("" if run["steps"] == 24 else f", {run['steps']} steps")


def _figures(metrics: Mapping[str, float]) -> list[str]:
    return [f"{metrics[name]:.3f}" for name in METRICS]
