"""The rows that generate together: row i lives in slot i of the cache, and rows 0 to `count` - 1 are at work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_oprd.rollout import sampling
from megatron_oprd.types import Prompt, Rollout


@dataclass(frozen=True)
class Request:
    """One rollout to make."""

    prompt: Prompt
    sample_index: int
    order: int  # its place in the result
    max_new_tokens: int


class Slots:
    """What is known of each row, as tensors over the slots: a step costs no Python work per row, only rows that
    start or end do. Every rank of a replica holds the same. No communication."""

    def __init__(self, slots: int, max_new_tokens: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.size = slots
        self.requests: list[Request] = []
        self.tokens = zeros(slots)  # the last token of each row, not yet in the cache
        self.positions = zeros(slots)  # its position
        self.generated = zeros(slots)  # how many tokens each row has sampled
        self.limits = zeros(slots)  # how many it may sample
        self.responses = zeros(slots, max_new_tokens)
        self.numbers = zeros(slots, max_new_tokens, dtype=torch.float64)  # the uniform number behind each token
        self.rows = torch.arange(slots, device=device)
        self.eos_token_ids = eos_token_ids
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.longest = 0  # positions of the longest row, its last token included
        self.ragged = False  # whether the rows differ in length

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def free(self) -> int:
        return self.size - self.count

    def admit(self, request: Request, seed: int, step: int) -> int:
        """Give a request the next slot; its first token comes with `accept`. Returns the slot."""
        slot, limit = self.count, request.max_new_tokens
        numbers = sampling.uniforms(seed, step, request.prompt.index, request.sample_index, limit)
        self.numbers[slot, :limit] = torch.from_numpy(numbers).to(self.numbers)
        self.positions[slot] = len(request.prompt.prompt_ids) - 1
        self.generated[slot] = 0
        self.limits[slot] = limit
        self.requests.append(request)
        return slot

    def next_numbers(self) -> torch.Tensor:
        """The uniform number of each active row's next token, [count] float64."""
        return self.numbers[self.rows[: self.count], self.generated[: self.count]]

    def accept(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token a row, [count] int64; returns which rows end with it, [count] bool."""
        n = self.count
        self.tokens[:n] = tokens
        self.responses[self.rows[:n], self.generated[:n]] = tokens
        self.generated[:n] += 1
        self.positions[:n] += 1
        self.longest += 1
        return (self.generated[:n] >= self.limits[:n]) | torch.isin(tokens, self.eos)

    def sequence(self, slot: int) -> torch.Tensor:
        """The tokens of a row so far, prompt and response, [tokens] int64."""
        prompt = torch.tensor(self.requests[slot].prompt.prompt_ids, device=self.rows.device)
        return torch.cat((prompt, self.responses[slot, : int(self.generated[slot])]))

    def rollouts(self, ended: torch.Tensor) -> list[tuple[int, Rollout]]:
        """The rows marked in `ended` [count] bool, each with its place in the result."""
        return [self._rollout(slot) for slot in ended.nonzero()[:, 0].tolist()]

    def compact(self, ended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Drop the rows marked in `ended` [count] bool; the last rows move into the gaps.

        Returns (sources, targets), slots [n] int64, for what is stored by slot elsewhere; None when nothing moves.
        """
        gone = ended.tolist()
        left = len(gone) - sum(gone)
        targets = [slot for slot in range(left) if gone[slot]]
        sources = [slot for slot in range(left, len(gone)) if not gone[slot]]
        for source, target in zip(sources, targets, strict=True):
            self.requests[target] = self.requests[source]
        del self.requests[left:]
        if not targets:
            return None
        source, target = (torch.tensor(slots, device=self.rows.device) for slots in (sources, targets))
        for state in (self.tokens, self.positions, self.generated, self.limits, self.responses, self.numbers):
            state[target] = state[source]
        return source, target

    def measure(self) -> None:
        """Look the lengths up again after rows came or went; in between, all grow by one."""
        if not self.count:
            self.longest = 0
            return
        shortest, longest = self.positions[: self.count].aminmax()
        self.longest = int(longest) + 1
        self.ragged = bool(shortest != longest)

    def _rollout(self, slot: int) -> tuple[int, Rollout]:
        request = self.requests[slot]
        response = tuple(self.responses[slot, : int(self.generated[slot])].tolist())
        rollout = Rollout(
            prompt_ids=tuple(request.prompt.prompt_ids),
            response_ids=response,
            response_mask=(1,) * len(response),
            finish_reason="eos" if response[-1] in self.eos_token_ids else "length",
            prompt_index=request.prompt.index,
            sample_index=request.sample_index,
            data_source=request.prompt.data_source,
            teacher_prompt_ids=request.prompt.teacher_prompt_ids,
        )
        return request.order, rollout
