"""Choose the numbers that show best what a run changed, before and after it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_oprd.evaluation.records import Record, as_float, curve
from megatron_oprd.evaluation.scores import over_all_sources
from megatron_oprd.report.page import NO_VALUE, number
from megatron_oprd.report.run_files import RunFiles

# Metrics of an evaluation and of a step -> their words, the most telling first.
EVALUATION_TILES = {
    "perplexity": "perplexity of the teacher's answers",
    "reverse_kl": "KL(student || teacher) on the teacher's answers, nats",
    "argmax_agreement": "most likely token as the teacher's",
    "cosine": "cosine of student and teacher states",
}
STEP_TILES = {
    "output/reverse_kl": "KL(student || teacher) of the next token, nats",
    "rep/cosine": "cosine of student and teacher states, in training",
    "loss": "loss",
}


@dataclass(frozen=True)
class Tile:
    """A number before and after the training."""

    name: str
    before: float
    after: float
    note: str = ""


def tiles(run: RunFiles) -> list[Tile]:
    """Return the numbers that show best what changed: of the first and last evaluation, then of the steps.

    A step measures the student before it updates it, so the first step is the start.
    """
    found = []
    if len(run.evaluations) > 1:
        first, last = (over_all_sources(item["data"]) for item in (run.evaluations[0], run.evaluations[-1]))
        first, last = (scores if isinstance(scores, dict) else {} for scores in (first, last))
        graded = {name: f"right answers, {name}" for name in first if name.startswith("avg@")}
        found += [
            Tile(name, as_float(first.get(key)), as_float(last.get(key)), _gap(key, first, last))
            for key, name in (graded | EVALUATION_TILES).items()
        ]
    for key, name in STEP_TILES.items():
        points = curve(run.metrics, key)
        if len(points) > 1 and not (key == "rep/cosine" and any("cosine" in tile.name for tile in found)):
            (start, before), (end, after) = points[0], points[-1]
            found.append(Tile(name, before, after, f"step {start:g} and step {end:g}"))
    return [tile for tile in found if NO_VALUE not in (number(tile.before), number(tile.after))]


def _gap(key: str, first: Record, last: Record) -> str:
    """Return how much of the distance to the teacher's perplexity is closed."""
    teacher = as_float(first.get("teacher_perplexity"))
    if key != "perplexity" or not as_float(first.get(key)) > teacher:
        return ""
    closed = (first[key] - as_float(last.get(key))) / (first[key] - teacher)
    note = f"teacher {number(teacher)}"
    return f"{note}, {closed:.0%} of the gap closed" if 0 <= closed <= 1 else note
