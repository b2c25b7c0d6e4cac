"""The interface of rollout engines: the embedded engine and replay of stored rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_oprd.config import Config, RolloutConfig
from megatron_oprd.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature is applied first, then `top_k`, then `top_p`."""

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # share of the probability that is kept
    top_k: int = 0  # 0: all tokens
    max_new_tokens: int = 16384  # per response
    samples_per_prompt: int = 1
    logprobs: bool = False  # return the log-probability of each sampled token


def rollout_sampling(config: RolloutConfig) -> Sampling:
    """Return how training samples its rollouts."""
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens, config.samples_per_prompt)


def evaluation_sampling(config: Config) -> Sampling:
    """Return how an evaluation samples its answers."""
    evaluation = config.evaluation
    return Sampling(evaluation.temperature, evaluation.top_p, 0, config.evaluation_tokens, evaluation.samples)


class PendingRollouts(Protocol):
    """Rollouts that an engine generates, perhaps beside other work."""

    def result(self) -> list[Rollout]:
        """Wait for the rollouts and return them, ordered by prompt and then by sample, from sample 0.

        All ranks of a model replica call this together and receive the same rollouts. Raises what generation raises.
        """
        ...


class RolloutEngine(Protocol):
    """Generates rollouts.

    All ranks of one model replica (tensor x pipeline group) pass the same prompts and receive the same rollouts. Data-
    and context-parallel ranks pass different prompts. With expert parallelism over replicas, all replicas call
    `generate` at the same time.
    """

    def sync_weights(self, version: int) -> dict[str, float]:
        """Make the engine generate with the student's present weights, and return metrics of the transfer.

        An engine that shares the student's weights has nothing to do. Nothing may be pending. Collective over the
        world.

        Args:
            version: number of updates that the weights have seen.
        """
        ...

    def submit(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> PendingRollouts:
        """Start the rollouts of a training step with the weights of the last `sync_weights`.

        An engine that shares the student's weights generates before it returns.

        Args:
            limits: most tokens of a response to each prompt, in place of `Sampling.max_new_tokens`. A sample's tokens
                do not depend on the limit: a higher limit continues the same response.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> list[Rollout]:
        """Return the rollouts of a training step, ordered by prompt and then by sample, from sample 0."""
        ...


@dataclass(frozen=True)
class FinishedRollouts:
    """The result of an engine that generates before `submit` returns."""

    rollouts: list[Rollout]

    def result(self) -> list[Rollout]:
        """Return the rollouts."""
        return self.rollouts


class ImmediateEngine:
    """Base of engines that share the student's weights or need none: nothing to transfer, nothing pending."""

    def sync_weights(self, version: int) -> dict[str, float]:
        """Do nothing and return no metrics."""
        return {}

    def submit(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> FinishedRollouts:
        """Generate the rollouts of a training step and return them."""
        return FinishedRollouts(self.generate(prompts, step, limits))

    def generate(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> list[Rollout]:
        """Return the rollouts of a training step, ordered by prompt and then by sample, from sample 0."""
        raise NotImplementedError
