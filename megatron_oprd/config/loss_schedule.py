"""The section `loss.schedule`: how the weights of the two terms change from step to step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from pydantic import Field, field_validator, model_validator

from megatron_oprd.config.section import Section

Points = Sequence[tuple[int, float]]


class ScheduleConfig(Section):
    """Multipliers of the weights of both terms: straight lines between the points, constant before and after them."""

    representation: list[tuple[int, float]] = Field(
        [(0, 1.0)],
        min_length=1,
        description="points [updates made so far, multiplier] for loss.representation.weight",
    )
    output: list[tuple[int, float]] = Field(
        [(0, 1.0)],
        min_length=1,
        description="the same for loss.output.weight. A multiplier of 0 leaves out all work of its term",
    )

    @field_validator("representation", "output", mode="before")
    @classmethod
    def _read_points(cls, points: Any) -> Any:
        """Turn lists of two into pairs: YAML has no tuples, and strict pydantic accepts no list in their place."""
        if not isinstance(points, list):
            return points
        return [tuple(point) if isinstance(point, list) else point for point in points]

    @model_validator(mode="after")
    def _points_are_in_order(self) -> ScheduleConfig:
        for name in ("representation", "output"):
            points = getattr(self, name)
            steps = [step for step, _ in points]
            if steps != sorted(set(steps)) or min(steps) < 0:
                raise ValueError(f"loss.schedule.{name}={_text(points)}: steps must rise, from 0 on")
            if any(value < 0 for _, value in points):
                raise ValueError(f"loss.schedule.{name}={_text(points)}: no multiplier may be below 0")
            if all(value == 0 for _, value in points):
                raise ValueError(
                    f"loss.schedule.{name}={_text(points)} is 0 at every step; leave the term out with "
                    "loss.representation.weight=0 or loss.output.objective=none"
                )
        return self

    @property
    def steps(self) -> list[int]:
        """Return the steps between which both multipliers are straight."""
        return sorted({0, *(step for step, _ in (*self.representation, *self.output))})

    def multipliers(self, step: int) -> tuple[float, float]:
        """Return the multipliers (representation, output) of the update after `step` updates."""
        return _value(self.representation, step), _value(self.output, step)


def _value(points: Points, step: int) -> float:
    """Return the value of the line through `points` at `step`; exactly the value of a point at that point."""
    if step <= points[0][0]:
        return points[0][1]
    for (first, low), (second, high) in itertools.pairwise(points):
        if step < second:
            share = (step - first) / (second - first)
            return low + share * (high - low)
    return points[-1][1]


def _text(points: Points) -> str:
    return str([list(point) for point in points]).replace(" ", "")
