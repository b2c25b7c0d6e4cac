"""The horizon: a limit on the tokens of a step's responses below `rollout.max_new_tokens` (`rollout.horizon`).

`auto` stops where no loss has a token left to compare. A growing horizon depends on the step alone, so that a resumed
run has the same limits. Nothing in this module communicates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_oprd.config import Config
from megatron_oprd.rollout.engine import PendingRollouts, RolloutEngine
from megatron_oprd.types import Prompt, Rollout


def response_limit(config: Config, step: int) -> int:
    """Return the most tokens of a response in a training step, counted from 0."""
    horizon, most = config.rollout.horizon, config.rollout.max_new_tokens
    if horizon is None:
        return most
    if horizon == "auto":
        compared = config.loss.first_tokens
        assert compared is not None  # the configuration refuses auto otherwise
        return min(compared, most)
    return min(horizon.start + horizon.grow * (step // horizon.every), most)


def longest_response(config: Config) -> int:
    """Return the most tokens of a response in all steps of a run. No horizon ever falls."""
    return response_limit(config, max(config.train.steps - 1, 0))


def horizon_metrics(config: Config, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Return the horizon of a step, counted from 0, and the share of its rollouts that it cut; nothing without one."""
    if config.rollout.horizon is None:
        return {}
    cut = sum(rollout.finish_reason == "horizon" for rollout in rollouts)
    return {"rollout/horizon": response_limit(config, step), "rollout/horizon_fraction": cut / max(len(rollouts), 1)}


@dataclass(frozen=True)
class HorizonEngine:
    """Passes the horizon of each step to another engine, and marks the rollouts that the horizon cut."""

    engine: RolloutEngine
    horizon: Callable[[int], int]  # (step, from 0) -> most tokens of a response
    max_new_tokens: int  # without a horizon
    positions: int  # of the student: a response may end before the horizon because none is left

    def sync_weights(self, version: int) -> dict[str, float]:
        """Transfer the weights to the other engine."""
        return self.engine.sync_weights(version)

    def submit(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> PendingRollouts:
        """Start the rollouts of a step. A limit above the horizon is lowered to the horizon."""
        pending = self.engine.submit(prompts, step, self._limits(prompts, step, limits))
        return MarkedRollouts(pending, self, step)

    def generate(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> list[Rollout]:
        """Return the rollouts of a step. A limit above the horizon is lowered to the horizon."""
        return self.mark(self.engine.generate(prompts, step, self._limits(prompts, step, limits)), step)

    def mark(self, rollouts: Sequence[Rollout], step: int) -> list[Rollout]:
        """Return the rollouts with the finish reason "horizon" where nothing else would have ended the response."""
        horizon = self.horizon(step)

        def is_cut(rollout: Rollout) -> bool:
            most = min(self.max_new_tokens, self.positions - len(rollout.prompt_ids))
            return rollout.finish_reason == "length" and len(rollout.response_ids) == horizon < most

        return [
            dataclasses.replace(rollout, finish_reason="horizon") if is_cut(rollout) else rollout
            for rollout in rollouts
        ]

    def _limits(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None) -> list[int]:
        horizon = self.horizon(step)
        return [horizon] * len(prompts) if limits is None else [min(limit, horizon) for limit in limits]


@dataclass(frozen=True)
class MarkedRollouts:
    """Rollouts in progress that the horizon limits."""

    pending: PendingRollouts
    engine: HorizonEngine
    step: int

    def result(self) -> list[Rollout]:
        """Wait for the rollouts and return them, with those marked that the horizon cut."""
        return self.engine.mark(self.pending.result(), self.step)
