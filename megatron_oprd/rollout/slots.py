"""State of the rows in generation: row i uses slot i of the KV cache, and rows 0 to count - 1 are active."""

from __future__ import annotations

import torch

from megatron_oprd.rollout import sampling
from megatron_oprd.rollout.requests import Request
from megatron_oprd.types import Rollout


class Slots:
    """The state of each row, as tensors over the slots. Equal on every rank of a replica. No communication.

    A decoding step needs no Python loop over the rows; only rows that start or end do.
    """

    def __init__(self, slots: int, max_new_tokens: int, eos_token_ids: tuple[int, ...], device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.size = slots
        self.requests: list[Request] = []
        self.tokens = zeros(slots)  # the last token of each row, not yet in the cache
        self.positions = zeros(slots)  # position of that token
        self.generated = zeros(slots)  # sampled tokens of each row
        self.limits = zeros(slots)  # most tokens that each row may sample
        self.responses = zeros(slots, max_new_tokens)
        self.numbers = zeros(slots, max_new_tokens, dtype=torch.float64)  # the uniform number of each token
        self.rows = torch.arange(slots, device=device)
        self.eos_token_ids = eos_token_ids
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.longest = 0  # length of the longest row, including its last token
        self.ragged = False  # True if the rows have different lengths

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def free(self) -> int:
        return self.size - self.count

    def admit(self, request: Request, seed: int, step: int) -> int:
        """Assign the next free slot to a request and return the slot. Its first token is added by `append`."""
        slot, limit = self.count, request.max_new_tokens
        numbers = sampling.uniforms(seed, step, request.prompt.index, request.sample_index, limit)
        self.numbers[slot, :limit] = torch.from_numpy(numbers).to(self.numbers)
        self.positions[slot] = len(request.prompt.prompt_ids) - 1
        self.generated[slot] = 0
        self.limits[slot] = limit
        self.requests.append(request)
        return slot

    def next_numbers(self) -> torch.Tensor:
        """Return the uniform number for the next token of each active row, [count] float64."""
        return self.numbers[self.rows[: self.count], self.generated[: self.count]]

    def append(self, tokens: torch.Tensor) -> torch.Tensor:
        """Append one token to each active row, [count] int64, and return which rows end with it, [count] bool."""
        n = self.count
        self.tokens[:n] = tokens
        self.responses[self.rows[:n], self.generated[:n]] = tokens
        self.generated[:n] += 1
        self.positions[:n] += 1
        self.longest += 1
        return (self.generated[:n] >= self.limits[:n]) | torch.isin(tokens, self.eos)

    def sequence(self, slot: int) -> torch.Tensor:
        """Return prompt and response tokens of a row, [tokens] int64."""
        prompt = torch.tensor(self.requests[slot].prompt.prompt_ids, device=self.rows.device)
        return torch.cat((prompt, self.responses[slot, : int(self.generated[slot])]))

    def rollouts(self, ended: torch.Tensor) -> list[tuple[int, Rollout]]:
        """Return the rollouts of the rows in `ended` [count] bool, each with its index in the result."""
        return [self._rollout(slot) for slot in ended.nonzero()[:, 0].tolist()]

    def compact(self, ended: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Remove the rows in `ended` [count] bool and move the last rows into the gaps.

        Returns:
            (sources, targets), slots [n] int64, so that the KV cache can move its rows too; None if no row moves.
        """
        removed = ended.tolist()
        remaining = len(removed) - sum(removed)
        targets = [slot for slot in range(remaining) if removed[slot]]
        sources = [slot for slot in range(remaining, len(removed)) if not removed[slot]]
        for source, target in zip(sources, targets, strict=True):
            self.requests[target] = self.requests[source]
        del self.requests[remaining:]
        if not targets:
            return None
        source, target = (torch.tensor(slots, device=self.rows.device) for slots in (sources, targets))
        for state in (self.tokens, self.positions, self.generated, self.limits, self.responses, self.numbers):
            state[target] = state[source]
        return source, target

    def update_lengths(self) -> None:
        """Recompute `longest` and `ragged` after rows were added or removed. `append` adds one to all lengths."""
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
