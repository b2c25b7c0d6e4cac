"""What makes rollouts, whoever makes them: the embedded engine, or a file of stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_oprd.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from the logits: temperature (0: the most likely token), then `top_k` (0: all tokens),
    then `top_p`; and how many tokens and samples are drawn."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 16384
    samples_per_prompt: int = 1


class RolloutEngine(Protocol):
    """Every rank of one model replica (tensor x pipeline group) gives the same prompts and gets the same rollouts;
    data- and context-parallel ranks give different ones. Where experts are spread over replicas, all call it together.
    """

    def generate(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """The rollouts of training step `step`, by prompt in the order given, then by sample from 0."""
        ...
