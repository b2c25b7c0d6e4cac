"""The interface of rollout engines: the embedded engine and replay of stored rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_oprd.config import EvaluationConfig, RolloutConfig
from megatron_oprd.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. Temperature is applied first, then `top_k`, then `top_p`."""

    temperature: float = 1.0  # 0: the most likely token
    top_p: float = 1.0  # share of the probability that is kept
    top_k: int = 0  # 0: all tokens
    max_new_tokens: int = 16384  # per response
    samples_per_prompt: int = 1


def rollout_sampling(config: RolloutConfig) -> Sampling:
    """Return how training samples its rollouts."""
    return Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens, config.samples_per_prompt)


def evaluation_sampling(config: EvaluationConfig) -> Sampling:
    """Return how an evaluation samples its answers."""
    return Sampling(config.temperature, config.top_p, 0, config.max_new_tokens, config.samples)


class RolloutEngine(Protocol):
    """Generates rollouts.

    All ranks of one model replica (tensor x pipeline group) pass the same prompts and receive the same rollouts. Data-
    and context-parallel ranks pass different prompts. With expert parallelism over replicas, all replicas call
    `generate` at the same time.
    """

    def generate(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """Return the rollouts of a training step, ordered by prompt and then by sample, from sample 0."""
        ...
