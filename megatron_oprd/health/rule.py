"""Whether a student's health falls while the objective improves: what a run remembers of it, and the rule.

Hidden states that are compared in a subspace can come as close as one likes while the model forgets how to speak: the
objective alone does not see a collapse. Pure, no communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_oprd.config import Config

KL_RATIO = 1.5  # of the reverse KL to that at the start
KL_FLOOR = 0.01  # nats by which it must have risen too
ENTROPY_RATIO = 3.0  # of the entropy to that at the start, or the other way round
ENTROPY_FLOOR = 0.05  # nats by which it must have changed too: a confident model has little, and may well lose it
LENGTH_RATIO = 2.0  # of the mean response length to that of the first interval, or the other way round
ACCURACY_FALL = 0.25  # of the accuracy at the start
ACCURACY_FLOOR = 0.02  # by which it must have fallen too


@dataclass(frozen=True)
class Check:
    """What was measured after `step`: of the student on the start model's answers, and means over the steps since the
    last check (None at step 0)."""

    step: int
    perplexity: float
    entropy: float  # nats a token
    reverse_kl: float | None = None  # KL(student || teacher), nats a token; None: the teacher cannot be asked
    objective: float | None = None
    length_mean: float | None = None  # tokens of a response; None where the student does not generate them

    def metrics(self) -> dict[str, float]:
        """What the log has of it."""
        names = ("perplexity", "entropy", "reverse_kl", "objective")
        values = {f"health/{name}": getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class HealthWarning:
    """What got worse (`kind`), said once in a run."""

    step: int
    kind: str
    message: str


@dataclass(frozen=True)
class Health:
    """What a run remembers for the rule."""

    checks: tuple[Check, ...] = ()
    since: tuple[tuple[float, float], ...] = ()  # objective and mean response length of each step after the last check
    accuracies: tuple[Mapping[str, float], ...] = ()  # of each evaluation: avg@n by data source
    warnings: tuple[HealthWarning, ...] = ()

    def with_step(self, metrics: Mapping[str, float]) -> Health:
        """After a training step."""
        seen = metrics["loss"], metrics["rollout/length_mean"]
        return dataclasses.replace(self, since=(*self.since, seen))

    def with_check(self, check: Check, *, generates: bool) -> Health:
        """After a check, which gets the means of the steps before it. `generates`: whether the lengths of the responses
        are the student's doing."""
        if self.since:
            objectives, lengths = zip(*self.since, strict=True)
            check = dataclasses.replace(
                check, objective=_mean(objectives), length_mean=_mean(lengths) if generates else None
            )
        return dataclasses.replace(self, checks=(*self.checks, check), since=())

    def with_evaluation(self, data: Mapping[str, Mapping[str, float]]) -> Health:
        """After an evaluation, from the metrics of every data source."""
        accuracy = {
            source: value for source, scores in data.items() for name, value in scores.items() if name[:4] == "avg@"
        }
        return dataclasses.replace(self, accuracies=(*self.accuracies, accuracy))

    def with_warnings(self, new: list[HealthWarning]) -> Health:
        return dataclasses.replace(self, warnings=(*self.warnings, *new))


def judge(health: Health, step: int, config: Config) -> list[HealthWarning]:
    """What is to be warned of after `step` and has not been: signs of a collapse, while the mean of the objective since
    the last check is lower than before the first one."""
    start, *intervals = health.checks or (None,)
    if start is None or len(intervals) < 2:
        return []
    first, last = intervals[0], intervals[-1]
    assert first.objective is not None and last.objective is not None  # only the check at step 0 has none
    if not last.objective < first.objective:
        return []
    improved = f"step {step}: the objective fell from {first.objective:.4g} to {last.objective:.4g} while"
    known = {warning.kind for warning in health.warnings}
    signs = {**dict(_model_signs(start, last, config)), **dict(_behaviour_signs(first, last, health))}
    return [
        HealthWarning(step, kind, f"{improved} {sign}: the student may be collapsing; {_advice(config)}")
        for kind, sign in signs.items()
        if kind not in known
    ]


def _model_signs(start: Check, last: Check, config: Config) -> Iterator[tuple[str, str]]:
    """Of the distributions on the start model's answers."""
    ratio = config.health.perplexity_ratio
    if last.perplexity > ratio * start.perplexity:
        change = _change(start.perplexity, last.perplexity)
        yield "perplexity", f"perplexity of the start model's own answers {change} (health.perplexity_ratio={ratio:g})"
    before, after = start.reverse_kl, last.reverse_kl
    if before is not None and after is not None and after > max(KL_RATIO * before, before + KL_FLOOR):
        yield "reverse_kl", f"KL(student || teacher) on the start model's answers {_change(before, after)}"
    if _differs(start.entropy, last.entropy, ENTROPY_RATIO) and abs(last.entropy - start.entropy) > ENTROPY_FLOOR:
        change = _change(start.entropy, last.entropy)
        yield "entropy", f"entropy of the next token on the start model's answers {change}"


def _behaviour_signs(first: Check, last: Check, health: Health) -> Iterator[tuple[str, str]]:
    """Of what the student generates."""
    before, after = first.length_mean, last.length_mean
    if before is not None and after is not None and _differs(before, after, LENGTH_RATIO):
        yield "length", f"the mean response length {_change(before, after)}"
    start, now = (health.accuracies[0], health.accuracies[-1]) if health.accuracies else ({}, {})
    lost = [
        f"on {source} {_change(accuracy, now[source])}"
        for source, accuracy in start.items()
        if accuracy - now.get(source, accuracy) > max(ACCURACY_FALL * accuracy, ACCURACY_FLOOR)
    ]
    if lost:
        yield "accuracy", f"the accuracy {', '.join(lost)}"


def _differs(before: float, after: float, ratio: float) -> bool:
    return after > ratio * before or ratio * after < before


def _change(before: float, after: float) -> str:
    return f"{'rose' if after > before else 'fell'} from {before:.4g} to {after:.4g}"


def _advice(config: Config) -> str:
    advice = "lower optimizer.lr"
    if config.loss.reads_layers:
        advice += " or loss.representation.weight"
    return advice if config.loss.reads_output else f"{advice}, or add loss.output.objective=full_kl"


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
