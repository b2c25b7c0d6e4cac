"""The rule that warns of a collapse: the student's health falls while the objective improves.

Hidden states that are compared in a subspace can become arbitrarily similar while the model loses its ability to
generate text. The objective alone does not reveal this. `watch.py` keeps the history and calls the rule. Pure
functions, no communication.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_oprd.config import Config

# A warning needs a relative change beyond the ratio and an absolute change beyond the floor.
KL_RATIO = 1.5  # reverse KL now / at the start
KL_FLOOR = 0.01  # nats
KL_RECOVERY = 0.9  # below this fraction of the reverse KL at the start, the student is recovering
ENTROPY_RATIO = 3.0  # entropy now / at the start, or the inverse
ENTROPY_FLOOR = 0.05  # nats; the small entropy of a confident model may fall by any factor
LENGTH_RATIO = 2.0  # mean response length now / in the first interval, or the inverse
ACCURACY_FALL = 0.25  # fraction of the accuracy at the start that is lost
ACCURACY_FLOOR = 0.02


@dataclass(frozen=True)
class Check:
    """The measurements after a training step."""

    step: int
    perplexity: float  # of the start model's answers under the student
    entropy: float  # nats a token
    reverse_kl: float | None = None  # KL(student || teacher), nats a token; None: no teacher distribution
    objective: float | None = None  # mean loss since the previous check; None at step 0
    length_mean: float | None = (
        None  # mean response tokens since the previous check; None at step 0 and if lengths do not count
    )

    def metrics(self) -> dict[str, float]:
        """Return the metrics that `metrics.jsonl` and tensorboard contain."""
        names = ("perplexity", "entropy", "reverse_kl", "objective")
        values = {f"health/{name}": getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class HealthWarning:
    """A warning. Each kind is given once in a run."""

    step: int
    kind: str  # perplexity, reverse_kl, entropy, length or accuracy
    message: str


@dataclass(frozen=True)
class HealthHistory:
    """The measurements of a run so far, as the rule needs them."""

    checks: tuple[Check, ...] = ()
    steps_since_check: tuple[tuple[float, float], ...] = ()  # (loss, mean response length) of each step
    accuracies: tuple[Mapping[str, float], ...] = ()  # avg@n by data source, for each evaluation
    warnings: tuple[HealthWarning, ...] = ()

    def with_step(self, metrics: Mapping[str, float]) -> HealthHistory:
        """Return the history after a training step."""
        step = metrics["loss"], metrics["rollout/length_mean"]
        return dataclasses.replace(self, steps_since_check=(*self.steps_since_check, step))

    def with_check(self, check: Check, *, with_lengths: bool) -> HealthHistory:
        """Return the history after a check, to which the means over the steps before it are added.

        `with_lengths`: True if the lengths of the responses reveal something about the student.
        """
        if self.steps_since_check:
            objectives, lengths = zip(*self.steps_since_check, strict=True)
            check = dataclasses.replace(
                check, objective=_mean(objectives), length_mean=_mean(lengths) if with_lengths else None
            )
        return dataclasses.replace(self, checks=(*self.checks, check), steps_since_check=())

    def with_evaluation(self, scores: Mapping[str, Mapping[str, float]]) -> HealthHistory:
        """Return the history after an evaluation with these metrics by data source."""
        accuracy = {
            source: value
            for source, of_source in scores.items()
            for name, value in of_source.items()
            if name[:4] == "avg@"
        }
        return dataclasses.replace(self, accuracies=(*self.accuracies, accuracy))

    def with_warnings(self, new: list[HealthWarning]) -> HealthHistory:
        """Return the history with additional warnings."""
        return dataclasses.replace(self, warnings=(*self.warnings, *new))


def new_warnings(history: HealthHistory, step: int, config: Config) -> list[HealthWarning]:
    """Return the signs of a collapse after `step` of which the run has not warned yet.

    There are none unless the objective improved: its mean before the last check is below its mean before the first.
    With `loss.schedule` the objective is another one at each step and cannot improve, so that the signs alone decide.
    While the student is recovering, only a falling accuracy is a sign: a damaged student unlearns its own answers.
    """
    start, *intervals = history.checks or (None,)
    if start is None or len(intervals) < 2:
        return []
    first, last = intervals[0], intervals[-1]
    assert first.objective is not None and last.objective is not None  # only the check at step 0 has no objective
    improved = f"step {step}: "
    if config.loss.schedule is None:
        if not last.objective < first.objective:
            return []
        improved += f"the objective fell from {first.objective:.4g} to {last.objective:.4g} while "
    known = {warning.kind for warning in history.warnings}
    signs = dict(_accuracy_signs(history))
    if not _recovering(start, last):
        signs |= {**dict(_model_signs(start, last, config)), **dict(_length_signs(first, last))}
    return [
        HealthWarning(step, kind, f"{improved}{sign}: the student may be collapsing; {_advice(config)}")
        for kind, sign in signs.items()
        if kind not in known
    ]


def _model_signs(start: Check, last: Check, config: Config) -> Iterator[tuple[str, str]]:
    """Yield (kind, description) for each sign in the next-token distributions on the start model's answers."""
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


def _recovering(start: Check, last: Check) -> bool:
    """Return True if the student's distributions on the start model's answers came closer to the teacher's."""
    before, after = start.reverse_kl, last.reverse_kl
    return before is not None and after is not None and after < KL_RECOVERY * before


def _length_signs(first: Check, last: Check) -> Iterator[tuple[str, str]]:
    """Yield (kind, description) if the responses became much longer or shorter."""
    before, after = first.length_mean, last.length_mean
    if before is not None and after is not None and _differs(before, after, LENGTH_RATIO):
        yield "length", f"the mean response length {_change(before, after)}"


def _accuracy_signs(history: HealthHistory) -> Iterator[tuple[str, str]]:
    """Yield (kind, description) if the accuracy fell since the first evaluation."""
    start, now = (history.accuracies[0], history.accuracies[-1]) if history.accuracies else ({}, {})
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
