"""The position of a run, which a checkpoint stores, and the identity of its teachers.

Everything random in a run is a function of the seed and of this position: rollouts of (seed, step, prompt, sample), the
order of prompts of (seed, epoch). No state of a random-number generator has to be stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_oprd.data.prompts import PromptState
from megatron_oprd.rollout.engine import PendingRollouts
from megatron_oprd.types import Rollout, StepReport


@dataclass(frozen=True)
class PendingStep:
    """The rollouts of the next step, which an engine may still generate."""

    version: int  # updates that the sampling weights have seen
    prompts: PromptState  # prompts taken so far, those of the next step included
    generation: PendingRollouts  # of this replica

    @cached_property
    def rollouts(self) -> list[Rollout]:
        """Wait for the rollouts of this replica and return them. Raises what generation raises."""
        return self.generation.result()


@dataclass(frozen=True)
class BestEvaluation:
    """The best evaluation of a run so far, by the metric `evaluation.best`."""

    metric: str
    step: int
    value: float
    later: int = 0  # evaluations after it, none of which was better

    @property
    def name(self) -> str:
        """Return the name of the checkpoint's folder."""
        return f"step_{self.step:07d}"


@dataclass(frozen=True)
class Stop:
    """The reason why training ended before its last step."""

    message: str
    exit_code: int
    is_end: bool  # True: the run ends with export and report. False: the same command will continue it.


@dataclass(frozen=True)
class LayerSquares:
    """Running means over the steps of the mean square of the teacher's states, by student layer."""

    steps: int = 0
    means: Mapping[int, float] = field(default_factory=dict)

    def after(self, squares: Mapping[int, float]) -> LayerSquares:
        """Return the means after one more step. A step that measured nothing does not count."""
        if not squares:
            return self
        steps = self.steps + 1
        before = self.means or squares
        return LayerSquares(
            steps, {layer: before[layer] + (squares[layer] - before[layer]) / steps for layer in squares}
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the means as plain values, for a checkpoint."""
        return {"steps": self.steps, "means": {str(layer): mean for layer, mean in self.means.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerSquares:
        """Build the means from the values of `to_dict`."""
        return cls(int(values["steps"]), {int(layer): float(mean) for layer, mean in values["means"].items()})


@dataclass(frozen=True)
class TrainState:
    """The position of a run between two steps."""

    step: int = 0  # updates made so far
    prompts: PromptState = field(default_factory=PromptState)  # prompts that the student has trained on
    pending: PendingStep | None = None  # rollouts submitted before the last update (rollout.ahead)
    best: BestEvaluation | None = None  # None: evaluation.best is not set, or no evaluation was made yet

    # Of the teacher's layers so far (loss.representation.layer_weights=inverse_square)
    squares: LayerSquares = field(default_factory=LayerSquares)

    # Chosen by precision.teacher_fp8=auto after the first step; None: nothing was chosen
    teacher_in_fp8: bool | None = None

    def after_update(self, report: StepReport) -> TrainState:
        """Return the state with what the last update measured."""
        return replace(self, squares=self.squares.after(report.layer_squares))

    @property
    def is_best(self) -> bool:
        """Return True if the evaluation of this step is the best so far."""
        return self.best is not None and self.best.step == self.step


@dataclass(frozen=True)
class Identity:
    """The properties of a teacher that must not change when a run resumes (the path may)."""

    path: str
    hash: str  # of the teacher's weights
    pairs: tuple[tuple[int, int], ...]  # compared layers (student, teacher)
    bridge: str | None = None  # hash of the bridge between student and teacher
    base: str | None = None  # lambda, hash of the base that targets are extrapolated from, space but representation
    ema: float | None = None  # of a teacher that follows the student; None: the teacher is frozen

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as plain values, for a checkpoint. A frozen teacher has no `ema`, one without a base no
        `base`."""
        absent = {key for key in ("base", "ema") if getattr(self, key) is None}
        return {key: value for key, value in asdict(self).items() if key not in absent}


def due(step: int, every: int, steps: int, first: int | None = None) -> bool:
    """Return True after every `every` steps, after the last of `steps` and after `first`; never if `every` is 0."""
    return every > 0 and (step % every == 0 or step in (steps, first))
