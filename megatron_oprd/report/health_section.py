"""The health section of a report: warnings and the curves that they are judged by."""

from __future__ import annotations

from pathlib import Path

from megatron_oprd.evaluation.records import by_step, curve, read_jsonl
from megatron_oprd.report.charts import escape
from megatron_oprd.report.line_chart import line_chart
from megatron_oprd.report.page import number, section

TITLES = {
    "perplexity": "Perplexity of the start model's own answers",
    "entropy": "Entropy of the next token on them (nats)",
    "reverse_kl": "KL(student || teacher) on them (nats)",
    "objective": "Objective, mean since the last check",
}


def health_section(run_dir: Path) -> str:
    """Return HTML from the folder `health/` of a run, or an empty string if health checks were off."""
    checks = by_step(read_jsonl(run_dir / "health" / "checks.jsonl"))
    if not checks:
        return ""
    warnings = len(read_jsonl(run_dir / "health" / "warnings.jsonl"))
    found = f"{warnings} warning{'s' * (warnings > 1)}: see the top of this page." if warnings else "No warning."
    charts = "".join(line_chart(title, {name: curve(checks, name)}) for name, title in TITLES.items())
    content = f'{_scored_answers(checks[0])}<p>{found}</p><div class="grid">{charts}</div>'
    return section("Health", content)


def _scored_answers(start: dict[str, object]) -> str:
    """Return one line on the answers that the health checks score."""
    if "answers" not in start:
        return ""
    facts = f"{number(start['answers'])} answers of the start model"
    if start.get("right") is not None:
        facts += f", {number(start['right'])} of {number(start.get('graded'))} right"
    facts += "; only the right ones are read" if start.get("filtered") is True else "; all are read"
    return f'<p class="muted">{escape(facts)}.</p>'
