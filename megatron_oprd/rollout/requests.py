"""The rollouts to generate for a step: one request for each sample of each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.types import Prompt, UserError


@dataclass(frozen=True)
class Request:
    """A rollout to generate."""

    prompt: Prompt
    sample_index: int
    order: int  # index in the result of `generate`
    max_new_tokens: int

    @property
    def longest(self) -> int:
        """Return the most tokens of prompt and response."""
        return len(self.prompt.prompt_ids) + self.max_new_tokens


def make_requests(
    prompts: Sequence[Prompt], spec: ModelSpec, sampling: Sampling, limits: Sequence[int] | None = None
) -> list[Request]:
    """Return the requests of all prompts, ordered by prompt and then by sample. No communication.

    An answer ends at the last position of the student.

    Args:
        limits: most tokens of a response, one for each prompt; replaces `sampling.max_new_tokens`.

    Raises:
        UserError: a prompt is empty or leaves no position for an answer.
    """
    requests: list[Request] = []
    for number, prompt in enumerate(prompts):
        room = spec.max_position_embeddings - len(prompt.prompt_ids)
        if not prompt.prompt_ids:
            raise UserError(
                f"prompt {prompt.index} is empty, and a model needs at least one token to continue; leave it out"
            )
        if room < 1:
            raise UserError(
                f"prompt {prompt.index} has {len(prompt.prompt_ids)} tokens and leaves no room for an answer: the "
                f"student has {spec.max_position_embeddings} positions; lower data.max_prompt_tokens"
            )
        limit = min(room, sampling.max_new_tokens if limits is None else limits[number])
        for sample_index in range(sampling.samples_per_prompt):
            requests.append(Request(prompt, sample_index, len(requests), limit))
    return requests
