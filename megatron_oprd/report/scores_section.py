"""Show the evaluations of a run as a table: the first, the last and the teacher's, with what changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_oprd.evaluation.best import LOWER_IS_BETTER
from megatron_oprd.evaluation.records import Record, get, ordered
from megatron_oprd.report.charts import escape
from megatron_oprd.report.page import NO_VALUE, Raw, number, section, table
from megatron_oprd.report.run_files import RunFiles

# Beginning of a metric's name -> the words that explain it and the metrics beside it.
EXPLAINED = {
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
_LOWER_IS_BETTER = LOWER_IS_BETTER | {"unanswered", "truncated"}
_NO_DIRECTION = {"mean_length", "dist-4g", "teacher_perplexity"}


def scores_section(run: RunFiles) -> str:
    """Return a table of the first and the last evaluation, below the line on the best one."""
    first_and_last = [*run.evaluations[:1], *run.evaluations[1:][-1:]]
    columns = [*first_and_last, *([run.teacher_evaluation] if run.teacher_evaluation else [])]
    if not columns:
        return section("Evaluation", '<p class="muted">This run has no evaluation.</p>')
    titles = ["metric", *(_title(item) for item in columns)]
    has_change = len(first_and_last) == 2
    if has_change:
        titles.insert(3, "change")
    sources, rows = ordered(item["data"] for item in columns), []
    names = set()
    for source in sources:
        rows += [[source]] if len(sources) > 1 else []
        for metric in ordered(item["data"].get(source) for item in columns):
            if "/layer_" in metric:
                continue
            names.add(metric)
            values = [get(item["data"], source, metric) for item in columns]
            cells: list[object] = [number(value) for value in values]
            if has_change:
                cells.insert(2, _change(metric, *values[:2]))
            rows.append([metric, *cells])
    return section("Evaluation", _best(run.best) + table(titles, rows) + _notes(sources, names))


def best_marked(metric: str, values: Sequence[Any]) -> list[object]:
    """Return the numbers of several models as cells, with the best marked if the metric has a direction."""
    cells = [number(value) for value in values]
    known = [value for value, cell in zip(values, cells, strict=True) if cell != NO_VALUE]
    if metric in _NO_DIRECTION or len(set(known)) < 2:
        return list(cells)
    best = min(known) if metric in _LOWER_IS_BETTER else max(known)
    return [Raw(cell, "good") if value == best else cell for value, cell in zip(values, cells, strict=True)]


def _notes(sources: list[str], names: set[str]) -> str:
    words = [text for beginning, text in EXPLAINED.items() if any(name.startswith(beginning) for name in names)]
    words += ["Not graded: no prompt has a right answer."] if not any(name.startswith("avg@") for name in names) else []
    words = [f"Data: {sources[0]}.", *words] if len(sources) == 1 else words
    return f'<p class="muted">{escape(" ".join(words))}</p>'


def _best(best: Record) -> str:
    """Return one line on the best evaluation, from `best.json`, or an empty string without one."""
    if "metric" not in best:
        return ""
    text = f"Best by {best['metric']}: step {number(best.get('step'))} with {number(best.get('value'))}"
    return f"<p>{escape(text)} (<code>{escape(best.get('checkpoint'))}</code>).</p>"


def _title(evaluation: Record) -> str:
    """Return the name of an evaluation, with its step if the name lacks it."""
    name, step = str(evaluation.get("name", "")), f"step {number(evaluation.get('step'))}"
    return name if name in (step, "teacher") else f"{name} ({step})"


def _change(metric: str, before: Any, after: Any) -> Raw:
    if NO_VALUE in (number(before), number(after)):
        return Raw(NO_VALUE)
    difference = after - before
    better = "" if metric in _NO_DIRECTION or not difference else "good"
    if better and (difference > 0) == (metric in _LOWER_IS_BETTER):
        better = "bad"
    sign = "+" if difference > 0 else ""
    return Raw(f"{sign}{escape(number(difference))}", better)
