"""Write the report of a run: one self-contained HTML page from the files that the run folder has so far."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_oprd.config.yaml_core import load_yaml
from megatron_oprd.evaluation.best import LOWER_IS_BETTER
from megatron_oprd.evaluation.records import (
    Record,
    as_float,
    by_step,
    curve,
    get,
    is_number,
    ordered,
    read_best,
    read_jsonl,
    read_text,
)
from megatron_oprd.report.answers_section import answer_charts, best_line
from megatron_oprd.report.charts import escape
from megatron_oprd.report.health_section import health_section
from megatron_oprd.report.page import NO_VALUE, Raw, details, line_chart, number, page, table
from megatron_oprd.runtime.files import write_text
from megatron_oprd.types import UserError

TIMED_PARTS = ("rollout", "teacher", "student")
MAX_TEXT_CHARACTERS = 6000
SAMPLES_PER_STEP = 4
MAIN_METRICS = {
    "loss": "loss",
    "rep/cosine": "cosine of student and teacher states",
    "output/reverse_kl": "KL(student || teacher) of the next token, nats",
}
# Metric -> the words that explain it and those beside it.
EVALUATION_WORDS = {
    "avg@": (
        "avg@n: right answers among n samples of a prompt; best@n: prompts with a right one among them; unanswered: no "
        "answer found. All three are fractions from 0 to 1."
    ),
    "perplexity": (
        "On the teacher's answers: perplexity of student and teacher; forward_kl: KL(teacher || student) and "
        "reverse_kl: KL(student || teacher), in nats per token; argmax_agreement: tokens with the same most likely "
        "token, from 0 to 1; cosine: of the compared hidden states."
    ),
    "mean_length": "mean_length: tokens of the student's samples; truncated: fraction cut by the length limit.",
}
RELOAD_SECONDS = 60
_LOWER_IS_BETTER = LOWER_IS_BETTER | {"unanswered", "truncated"}
_NO_DIRECTION = {"mean_length", "dist-4g", "teacher_perplexity"}


def write_report(run_dir: str | Path, *, is_running: bool = False) -> Path:
    """Write `report.html` into the run folder and return its path.

    The sources are `metrics.jsonl`, `evaluations.jsonl`, `health/`, `plan.json`, `environment.json`, `config.yaml` and
    `rollouts/`; a missing file, a broken line or a value that is not finite leaves a gap. Only rank 0 calls this.

    Args:
        run_dir: The run folder.
        is_running: True if the run goes on: the page then says so and loads itself again every minute.

    Raises:
        UserError: the run folder does not exist.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"no run folder {run_dir}; name the train.run_dir of a run")
    metrics = by_step(read_jsonl(run_dir / "metrics.jsonl"))
    evaluations = [item for item in read_jsonl(run_dir / "evaluations.jsonl") if isinstance(item.get("data"), dict)]
    config_text = read_text(run_dir / "config.yaml")
    sections = [
        _heading(run_dir, config_text, metrics, is_running=is_running),
        _start_and_now(metrics),
        _before_after(evaluations, best_line(read_best(run_dir))),
        health_section(run_dir),
        _curves(metrics, evaluations),
        _time_and_memory(metrics),
        _samples(sorted((run_dir / "rollouts").glob("*.jsonl"))),
        _settings(run_dir, config_text),
    ]
    path = run_dir / "report.html"
    refresh = RELOAD_SECONDS if is_running else None
    text = page(f"Run {run_dir.resolve().name}", "".join(sections), refresh)
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))  # sampled text may contain a lone surrogate
    return path


def _heading(run_dir: Path, config_text: str, metrics: Sequence[Record], *, is_running: bool) -> str:
    try:
        config = load_yaml(config_text)
    except yaml.YAMLError:
        config = None
    paths = {role: get(config, role, "path") for role in ("student", "teacher")}
    models = "".join(f"<p>{role}: <code>{escape(path)}</code></p>" for role, path in paths.items() if path)
    stopped_at = read_best(run_dir).get("stopped_at")
    state = escape(_state(metrics, get(config, "train", "steps"), stopped_at, is_running=is_running))
    hint = "If that was long ago, the run may have ended: <code>megatron-oprd status RUN</code> tells."
    note = f'<p class="muted">{hint}</p>' if is_running else ""
    return f'<h1>On-policy representation distillation</h1><p class="state">{state}</p>{note}{models}'


def _state(metrics: Sequence[Record], planned: Any, stopped_at: Any, *, is_running: bool) -> str:
    """Return one sentence on the progress of the run, with the time at which the page of a running one was written.

    `stopped_at`: the step at which evaluation.patience ended the run, or None.
    """
    steps = f"{number(metrics[-1]['step'])} steps" if metrics else "no training step yet"
    complete = not metrics or not isinstance(planned, int) or metrics[-1]["step"] >= planned
    steps += "" if complete else f" of {planned}"
    if is_running:  # the page of an ended run has no time, so that the same command writes the same page again
        return f"running: {steps}; page written at {time.strftime('%Y-%m-%d %H:%M:%S')}"
    if metrics and stopped_at == metrics[-1]["step"]:
        return f"finished early: {steps}"
    return f"{'finished' if complete and metrics else 'stopped'}: {steps}"


def _start_and_now(metrics: Sequence[Record]) -> str:
    """Return a table of the main metrics at the first step, which measures the student before any update, and now."""
    rows: list[list[object]] = []
    for key, name in MAIN_METRICS.items():
        points = curve(metrics, key)
        if points:
            rows.append([name, *(number(value) for _, value in dict.fromkeys((points[0], points[-1])))])
    if not rows or max(map(len, rows)) < 3:
        return ""
    note = '<p class="muted">A step measures the student before it updates it, so the first column is the start.</p>'
    rows = [[*row, *[NO_VALUE] * (3 - len(row))] for row in rows]
    return f"<h2>Start and now</h2>{table(['metric', 'first step', 'last step'], rows)}{note}"


def _before_after(evaluations: Sequence[Record], best: str) -> str:
    """Return a table of the first and the last evaluation, below the line on the best one."""
    if not evaluations:
        return "<h2>Evaluation</h2><p class='muted'>This run has no evaluation.</p>"
    teachers = [item for item in evaluations if item.get("name") == "teacher"]
    student = [item for item in evaluations if item not in teachers] or evaluations
    first, last = student[0], student[-1]
    shown = [first] if first is last else [first, last]
    columns = [*shown, *teachers[-1:]]
    rows: list[list[object]] = []
    for source in ordered(item["data"] for item in columns):
        metrics = [name for name in ordered(item["data"].get(source) for item in columns) if "/layer_" not in name]
        for place, metric in enumerate(metrics):
            values = [get(item["data"], source, metric) for item in columns]
            cells: list[object] = [number(value) for value in values]
            if len(shown) == 2:
                cells.insert(2, _change(metric, values[0], values[1]))
            rows.append(["" if place else source, Raw(escape(metric), "text"), *cells])
    titles = [_title(item) for item in columns]
    if len(shown) == 2:
        titles.insert(2, "change")
    names = {cell.html for row in rows for cell in row if isinstance(cell, Raw) and cell.css_class == "text"}
    words = [text for name, text in EVALUATION_WORDS.items() if any(one.startswith(name) for one in names)]
    words += ["Not graded: no prompt has a right answer."] if not any(name.startswith("avg@") for name in names) else []
    explained = f'<p class="muted">{escape(" ".join(words))}</p>'
    return "<h2>Evaluation</h2>" + best + table(["data", "metric", *titles], rows, text_columns=["metric"]) + explained


def _title(evaluation: Record) -> str:
    """Return the name of an evaluation, with its step if the name lacks it."""
    name, step = str(evaluation.get("name", "")), f"step {number(evaluation.get('step'))}"
    return name if name == step else f"{name} ({step})"


def _change(metric: str, before: Any, after: Any) -> Raw:
    if NO_VALUE in (number(before), number(after)):
        return Raw(NO_VALUE)
    difference = after - before
    better = "" if metric in _NO_DIRECTION or not difference else "good"
    if better and (difference > 0) == (metric in _LOWER_IS_BETTER):
        better = "bad"
    sign = "+" if difference > 0 else ""
    return Raw(f"{sign}{escape(number(difference))}", better)


def _curves(metrics: Sequence[Record], evaluations: Sequence[Record]) -> str:
    layers = sorted(
        {int(m[1]) for row in metrics for key in row if (m := re.fullmatch(r"rep/cosine/layer_(\d+)", key))}
    )
    by_layer = {f"layer {layer}": curve(metrics, f"rep/cosine/layer_{layer}") for layer in layers}
    ends = {
        f"step {row['step']}": [(float(layer), as_float(row.get(f"rep/cosine/layer_{layer}"))) for layer in layers]
        for row in [*metrics[:1], *metrics[1:][-1:]]
    }
    charts = [
        *_accuracy(evaluations),
        *answer_charts([item for item in evaluations if item.get("name") != "teacher"]),
        line_chart("Loss", {"loss": curve(metrics, "loss")}),
        line_chart("Cosine of student and teacher states, mean over layers", {"cosine": curve(metrics, "rep/cosine")}),
        line_chart("Cosine per layer over the training", by_layer),
        line_chart("Cosine per layer, first and last step", ends if layers else {}, x_label="layer"),
        line_chart("Squared error of the states, mean over layers", {"mse": curve(metrics, "rep/mse")}),
        line_chart(
            "Norm of the states",
            {who: curve(metrics, f"rep/{who}_norm") for who in ("student", "teacher")},
        ),
        *_output_charts(metrics),
        line_chart("Gradient norm, before clipping", {"gradient norm": curve(metrics, "grad_norm")}),
        line_chart("Learning rate", {"lr": curve(metrics, "lr")}),
        line_chart(
            "Response length (tokens)",
            {
                "mean": curve(metrics, "rollout/length_mean"),
                "max": curve(metrics, "rollout/length_max"),
                "horizon": curve(metrics, "rollout/horizon"),
            },
        ),
        line_chart("Truncated responses (fraction)", {"": curve(metrics, "rollout/truncated_fraction")}),
        line_chart("Responses cut by the horizon (fraction)", {"": curve(metrics, "rollout/horizon_fraction")}),
    ]
    drawn = "".join(charts)
    return f'<h2>Curves</h2><div class="grid">{drawn}</div>' if drawn else ""


def _output_charts(metrics: Sequence[Record]) -> list[str]:
    """Return the charts of an output-space objective's metrics."""
    shown = {
        "Value of the output-space objective": {"objective": "loss"},
        "KL(student || teacher) of the next token": {"exact": "reverse_kl", "sampled": "sampled_kl"},
        "Entropy of the next token": {"student": "student_entropy", "teacher": "teacher_entropy"},
        "Agreement on the next token": {"top k": "topk_overlap", "most likely": "argmax_agreement"},
        "Mass of the top k": {"student": "student_mass", "teacher": "teacher_mass"},
    }
    return [
        line_chart(title, {line: curve(metrics, f"output/{name}") for line, name in lines.items()})
        for title, lines in shown.items()
    ]


def _accuracy(evaluations: Sequence[Record]) -> list[str]:
    """Return one chart per accuracy metric, with a line per data source."""
    student = [item for item in evaluations if item.get("name") != "teacher"]
    charts = []
    for metric in ordered(scores for item in student for scores in item["data"].values()):
        if metric.startswith(("avg@", "best@")) and metric != "best@1":  # best@1 equals avg@1
            lines = {
                source: [(as_float(item.get("step")), as_float(get(item["data"], source, metric))) for item in student]
                for source in ordered(item["data"] for item in student)
            }
            charts.append(line_chart(f"Accuracy, {metric}", lines))
    return charts


def _time_and_memory(metrics: Sequence[Record]) -> str:
    # The first step also compiles, allocates and warms up, so the mean leaves it out.
    steady = metrics[1:] or metrics
    seconds = {part: _mean_of(steady, f"time/{part}") for part in (*TIMED_PARTS, "step")}
    total = seconds.pop("step")
    if total is None:
        return ""
    known = {part: value for part, value in seconds.items() if value is not None}
    known["other"] = max(0.0, total - sum(known.values()))
    rows: list[list[object]] = []
    for part, value in [*known.items(), ("whole step", total)]:
        share = value / total if total > 0 else 0.0
        bar = Raw(
            f'<div class="bar" style="width:{min(share, 1.0):.1%}"></div>' if part != "whole step" else "", "wide"
        )
        rows.append([part, number(round(value, 4)), f"{share:.0%}", bar])
    peak = max((value for row in metrics if (value := as_float(row.get("memory/peak_bytes"))) > 0), default=None)
    memory = f"<p>Peak memory: {number(round(peak / 2**30, 3))} GiB</p>" if peak else ""
    title = "<h2>Time per step</h2><p class='muted'>Mean seconds, the first step left out.</p>"
    return title + table(["part", "seconds", "share", ""], rows) + memory


def _samples(files: Sequence[Path]) -> str:
    samples = [item for file in files for item in read_jsonl(file) if is_number(item.get("step"))]
    if not samples:
        return ""
    steps = sorted({item["step"] for item in samples})
    blocks = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        of_step = [item for item in samples if item["step"] == step]
        blocks.append(
            f"<h3>Step {number(step)}</h3>"
            + "".join(_sample(item, item is of_step[0]) for item in of_step[:SAMPLES_PER_STEP])
        )
    return "<h2>Responses</h2>" + "".join(blocks)


def _sample(item: Record, is_open: bool) -> str:
    facts = [f"prompt {item.get('prompt_index', '?')}, sample {item.get('sample_index', '?')}"]
    if item.get("finish_reason"):
        facts.append(f"ended by {item['finish_reason']}")
    if isinstance(item.get("correct"), bool) and item.get("ground_truth") is not None:
        facts.append("correct" if item["correct"] else f"wrong, it is {item['ground_truth']}")
    prompt, response = _shortened(str(item.get("prompt", ""))), _shortened(str(item.get("response", "")))
    return details(" · ".join(facts), f"{prompt}\n\n── response ──\n{response}", is_open=is_open)


def _settings(run_dir: Path, config_text: str) -> str:
    found = [("Layer pairs and their owners (plan.json)", "plan.json"), ("Environment", "environment.json")]
    blocks = [details(title, text) for title, name in found if (text := read_text(run_dir / name))]
    if config_text:
        blocks.insert(0, details("Resolved configuration (config.yaml)", config_text))
    return "<h2>Settings</h2>" + "".join(blocks) if blocks else ""


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT_CHARACTERS:
        return text
    half = MAX_TEXT_CHARACTERS // 2
    return f"{text[:half]}\n… {len(text) - 2 * half:,} characters left out …\n{text[-half:]}"


def _mean_of(metrics: Sequence[Record], key: str) -> float | None:
    values = [value for _, value in curve(metrics, key) if value >= 0]
    return sum(values) / len(values) if values else None
