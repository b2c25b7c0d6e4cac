"""The tables and the plots of docs/real_model.md, from real_model.json."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.pages import table_lines
from benchmarks.real_model_methods import NAMES
from megatron_oprd.analysis.figures import line_plot

Run = Mapping[str, Any]
RATE = 2e-4  # of the recipe
# metric of an evaluation -> name in the table
METRICS = {
    "perplexity": "perplexity",
    "forward_kl": "KL(teacher, student)",
    "reverse_kl": "KL(student, teacher)",
    "argmax_agreement": "most likely token in common",
}


def tables(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the tables, one for each device, with a line above that names the device."""
    lines: list[str] = []
    for device, facts in record["devices"].items():
        runs = [run for run in record["runs"] if run["device"] == device]
        finished = [run for run in runs if "stopped_after" not in run]
        if finished:
            lines += [*([""] if lines else []), f"**{device}**", "", *table(finished, facts)]
        if len(runs) > len(finished):
            lines += ["", f"**{device}, by step**", "", *table_by_step(runs)]
    return lines


def has_time(run: Run, facts: Mapping[str, Any]) -> bool:
    """Return True if other trials had no part in the time of a step: CPU time, or a GPU of its own."""
    return bool(run.get("seconds_per_step")) and (run["device"] == "CPU" or facts["parallel"] == 1)


def table_by_step(runs: Sequence[Run]) -> list[str]:
    """Return the lines of a table with the perplexity at each evaluation, of trials that ended early too."""
    runs = [run for run in runs if run["learning_rate"] == RATE and not run["equal_time"]]
    steps = sorted({point["step"] for run in runs for point in run["evaluations"]} - {0})
    rows = []
    for same in grouped(runs).values():
        at_steps = [_perplexities(same, step) for step in steps]
        cells = [f"{_mean_and_range(values, '.3f')}{_of_seeds(len(values))}" for values in at_steps]
        rows.append([NAMES[same[0]["method"]], *cells])
    return table_lines(["trained on", *(f"{step} steps" for step in steps)], rows)


def _perplexities(runs: Sequence[Run], step: int) -> list[float]:
    return [point["perplexity"] for run in runs for point in run["evaluations"] if point["step"] == step]


def _of_seeds(count: int) -> str:
    return "" if count < 2 else f", {count} seeds"


def table(runs: Sequence[Run], facts: Mapping[str, Any]) -> list[str]:
    """Return the lines of a table: a row for the start model, then one for the runs that differ in the seed alone.

    A figure is the mean over seeds; ranges go from the lowest to the highest. Trials that shared a GPU have no time.

    Args:
        facts: the entry of the device in real_model.json.
    """
    head = [
        "trained on",
        "learning rate",
        "steps",
        "seeds",
        *METRICS.values(),
        "gap closed",
        "own answers",
        "s per step",
    ]
    before = runs[0]["before"]
    own = f"{facts['own_answers_before']['reverse_kl']:.3f}" if facts.get("own_answers_before") else ""
    rows: list[list[Any]] = [
        ["nothing: the pruned model", "", "", "", *(f"{before[name]:.3f}" for name in METRICS), "", own]
    ]
    for same in grouped(runs).values():
        own_kl = [run["own_answers"]["reverse_kl"] for run in same if run.get("own_answers")]
        seconds = [run["seconds_per_step"] for run in same if has_time(run, facts)]
        steps = [run["steps"] for run in same]
        rows.append(
            [
                NAMES[same[0]["method"]],
                f"{same[0]['learning_rate']:g}",
                _range(steps, "g"),
                len(same),
                *(_mean_and_range([run["after"][name] for run in same], ".3f") for name in METRICS),
                _mean_and_range([gap_closed(run) for run in same], ".0%"),
                _mean_and_range(own_kl, ".3f"),
                f"{statistics.mean(seconds):.3g}" if seconds else "",
            ]
        )
    return table_lines(head, rows)


def grouped(runs: Sequence[Run]) -> dict[tuple[Any, ...], list[Run]]:
    """Return the runs that differ in the seed alone: of each method, learning rate and equal steps or equal time."""
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["method"], run["learning_rate"], run["equal_time"]), []).append(run)
    return groups


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


def gap_closed(run: Run) -> float:
    """Return the part of the perplexity lost by pruning that the training brought back."""
    gap, rest = (run[name]["perplexity"] - run[name]["teacher_perplexity"] for name in ("before", "after"))
    return float(1 - rest / gap)


def plots(record: Mapping[str, Any]) -> dict[str, str]:
    """Return the plots by name: perplexity by step and by second for the recipe's steps, and by learning rate.

    They show the device with the most runs, and by second all runs whose time was measured. A plot without points is
    left out.
    """
    devices = [run["device"] for run in record["runs"]]
    runs = [run for run in record["runs"] if run["device"] == max(devices, key=devices.count)]
    at_rate = [run for run in runs if run["learning_rate"] == RATE and not run["equal_time"]]
    timed = [run for run in record["runs"] if run["learning_rate"] == RATE and not run["equal_time"]]
    timed = [run for run in timed if has_time(run, record["devices"][run["device"]])]
    titled = "Perplexity of the teacher's held-out answers by "
    finished = [run for run in runs if not run["equal_time"] and "stopped_after" not in run]
    made = {
        "steps": line_plot(f"{titled}step", _curves(at_rate, lambda run: 1.0), "step"),
        "seconds": line_plot(f"{titled}second", _curves(timed, lambda run: run["seconds_per_step"]), "seconds"),
        "rates": line_plot(f"{titled}learning rate", _curves_by_rate(finished), "learning rate / 1e-5"),
    }
    return {name: plot for name, plot in made.items() if plot}


def _curves(runs: Sequence[Run], scale: Callable[[Run], float]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each method, the means over the seeds with the most evaluations.

    Runs that ended early count for methods without any finished run.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for (method, *_), group in grouped(runs).items():
        same = [run for run in group if "stopped_after" not in run] or group
        most = max(len(run["evaluations"]) for run in same)
        same = [run for run in same if len(run["evaluations"]) == most]
        by_step: dict[int, list[float]] = {}
        for point in (point for run in same for point in run["evaluations"]):
            by_step.setdefault(point["step"], []).append(point["perplexity"])
        unit = statistics.mean(map(scale, same))
        lines[NAMES[method]] = [(step * unit, statistics.mean(values)) for step, values in sorted(by_step.items())]
    return lines


def _curves_by_rate(runs: Sequence[Run]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each method with several learning rates: means over the seeds that ran with all of them."""
    methods: dict[str, dict[float, dict[int, float]]] = {}
    for run in runs:
        by_seed = methods.setdefault(run["method"], {}).setdefault(run["learning_rate"], {})
        by_seed[run["seed"]] = run["after"]["perplexity"]
    lines: dict[str, list[tuple[float, float]]] = {}
    for method, by_rate in methods.items():
        seeds = set.intersection(*map(set, by_rate.values()))
        if len(by_rate) > 1 and seeds:
            lines[NAMES[method]] = [
                (1e5 * rate, statistics.mean(by_seed[seed] for seed in seeds))
                for rate, by_seed in sorted(by_rate.items())
            ]
    return lines


def _mean_and_range(values: Sequence[float], form: str) -> str:
    """Return the mean and, of several values, in brackets the lowest and the highest one."""
    if not values:
        return ""
    mean = format(statistics.mean(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def _range(values: Sequence[float], form: str) -> str:
    low, high = min(values), max(values)
    return format(low, form) if low == high else f"{low:{form}} to {high:{form}}"
