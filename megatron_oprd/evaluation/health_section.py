"""The part of a report about the student's health: what was warned of, and the curves behind it."""

from __future__ import annotations

from pathlib import Path

from megatron_oprd.evaluation.page import escape, line_chart, number
from megatron_oprd.evaluation.records import by_step, curve, read_jsonl

TITLES = {
    "perplexity": "Perplexity of the start model's own answers",
    "entropy": "Entropy of the next token on them (nats)",
    "reverse_kl": "KL(student || teacher) on them (nats)",
    "objective": "Objective, mean since the last check",
}


def health_section(run_dir: Path) -> str:
    """HTML from `health/` in a run folder; nothing for a run that was not watched."""
    checks = by_step(read_jsonl(run_dir / "health" / "checks.jsonl"))
    if not checks:
        return ""
    warnings = [item.get("message") for item in read_jsonl(run_dir / "health" / "warnings.jsonl")]
    said = "".join(f'<p class="bad">warning: {escape(message)}</p>' for message in warnings)
    charts = "".join(line_chart(title, {"": curve(checks, name)}) for name, title in TITLES.items())
    return f'<h2>Health</h2>{_answers(checks[0])}{said or "<p>No warning.</p>"}<div class="grid">{charts}</div>'


def _answers(start: dict[str, object]) -> str:
    """What is read: a line on the start model's answers."""
    if "answers" not in start:
        return ""
    facts = f"{number(start['answers'])} answers of the start model"
    if start.get("right") is not None:
        facts += f", {number(start['right'])} of {number(start.get('graded'))} right"
    facts += "; only the right ones are read" if start.get("filtered") is True else "; all are read"
    return f'<p class="muted">{escape(facts)}.</p>'
