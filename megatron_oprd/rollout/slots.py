"""State of the rows in generation: row i uses slot i of the KV cache."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from megatron_oprd.rollout.requests import Request
from megatron_oprd.rollout.sampling import uniforms
from megatron_oprd.types import Prompt, Rollout


class Slots:
    """The state of each row, as tensors over the slots that never change their address. No communication.

    `append` reads nothing back from the device, and its kernels depend only on the number of rows. A row that ended
    stops changing, even if the host finds out later: `collect` returns its rollout. Until then the row is decoded in
    vain. All tensors and numbers are equal on every rank of a replica.
    """

    def __init__(
        self, slots: int, max_new_tokens: int, eos_token_ids: tuple[int, ...], device: torch.device, *, logprobs: bool
    ) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.size = slots
        self.requests: list[Request | None] = [None] * slots
        self.tokens = zeros(slots)  # the last token of each row, not yet in the cache
        self.positions = zeros(slots)  # position of that token
        self.generated = zeros(slots)  # sampled tokens of each row
        self.limits = zeros(slots)  # most tokens that each row may sample
        self.active = zeros(slots, dtype=torch.bool)  # False: the row ended, or the slot is free
        # One more column than tokens: a row that ended at its limit goes on writing there.
        self.responses = zeros(slots, max_new_tokens + 1)
        self.numbers = zeros(slots, max_new_tokens + 1, dtype=torch.float64)  # the uniform number of each token
        self.logprobs = zeros(slots, max_new_tokens + 1, dtype=torch.float64) if logprobs else None
        self.rows = torch.arange(slots, device=device)
        self.eos_token_ids = eos_token_ids
        self.eos = torch.tensor(eos_token_ids, dtype=torch.int64, device=device)
        self.steps = 0  # decode steps so far
        self.first_steps = [0] * slots  # the value of `steps` when each row started

    @property
    def count(self) -> int:
        """Return the number of slots with a request."""
        return sum(request is not None for request in self.requests)

    @property
    def end(self) -> int:
        """Return the number of rows up to the last one with a request."""
        return max((slot + 1 for slot, request in enumerate(self.requests) if request is not None), default=0)

    def occupied(self) -> list[tuple[int, Request]]:
        """Return the slots with a request, and the requests."""
        return [(slot, request) for slot, request in enumerate(self.requests) if request is not None]

    def length(self, slot: int) -> int:
        """Return the tokens of a row, with its last token, as if the row had not ended: the host need not ask."""
        request = self.requests[slot]
        assert request is not None
        return len(request.prompt.prompt_ids) + 1 + self.steps - self.first_steps[slot]

    @property
    def longest(self) -> int:
        """Return the tokens of the longest row, with its last token: exact if that row is active, else a bound."""
        rows = self.occupied()
        most = max((self.length(slot) for slot, _ in rows), default=0)
        return min(most, max((request.longest for _, request in rows), default=0))

    @property
    def all_at_their_limit(self) -> bool:
        """Return True if no row can go on, because of its limit."""
        return all(self.length(slot) >= request.longest for slot, request in self.occupied())

    def admit(self, waiting: deque[Request], most_tokens: int, seed: int, step: int) -> list[tuple[Prompt, list[int]]]:
        """Assign free slots to waiting requests, for prompts of `most_tokens` tokens in total or for one prompt.

        Returns: the prompts, each with the slots of its samples. Their first tokens are added by `append`.
        """
        free = deque(slot for slot, request in enumerate(self.requests) if request is None)
        starting: list[tuple[Prompt, list[int]]] = []
        slots: list[int] = []
        started: list[Request] = []
        tokens = 0
        while waiting and free:
            request = waiting[0]
            if not starting or starting[-1][0] is not request.prompt:
                tokens += len(request.prompt.prompt_ids)
                if starting and tokens > most_tokens:
                    break
                starting.append((request.prompt, []))
            slot = free.popleft()
            starting[-1][1].append(slot)
            self.requests[slot], self.first_steps[slot] = waiting.popleft(), self.steps
            slots.append(slot)
            started.append(request)
        if started:
            self._reset(slots, started, seed, step)
        return starting

    def _reset(self, slots: list[int], requests: list[Request], seed: int, step: int) -> None:
        """Set the state of the rows before their first token."""
        device = self.rows.device
        numbers = torch.zeros(len(slots), self.numbers.shape[1], dtype=torch.float64)
        for row, request in zip(numbers, requests, strict=True):
            drawn = uniforms(seed, step, request.prompt.index, request.sample_index, request.max_new_tokens)
            row[: len(drawn)] = torch.from_numpy(drawn)
        rows = torch.tensor(slots, device=device)
        self.numbers[rows] = numbers.to(device)
        self.positions[rows] = torch.tensor([len(request.prompt.prompt_ids) - 1 for request in requests], device=device)
        self.limits[rows] = torch.tensor([request.max_new_tokens for request in requests], device=device)
        self.generated[rows] = 0
        self.active[rows] = True

    def next_numbers(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the uniform number for the next token of each of `rows` [n] int64, [n] float64."""
        return self.numbers[rows, self.generated[rows]]

    def append(self, rows: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor | None) -> None:
        """Append one token to each of `rows`, both [n] int64, and mark the rows that end with it."""
        generated, active = self.generated[rows], self.active[rows]
        ends = (tokens[:, None] == self.eos).any(dim=-1) | (generated + 1 >= self.limits[rows])
        self.responses.index_put_((rows, generated), tokens)
        if self.logprobs is not None and logprobs is not None:
            self.logprobs.index_put_((rows, generated), logprobs)
        self.tokens.index_put_((rows,), tokens)
        self.generated.index_put_((rows,), generated + active)
        self.positions.index_put_((rows,), self.positions[rows] + active)
        self.active.index_put_((rows,), active & ~ends)

    def tokens_of(self, slot: int, count: int) -> torch.Tensor:
        """Return the first `count` tokens of a row, prompt and response, [count] int64."""
        request = self.requests[slot]
        assert request is not None
        prompt = torch.tensor(request.prompt.prompt_ids, device=self.rows.device)
        return torch.cat((prompt, self.responses[slot]))[:count]

    def collect(self) -> list[tuple[int, Rollout]]:
        """Wait for the device, free the slots of the rows that ended, and return their rollouts.

        Each rollout comes with its index in the result of `generate`.
        """
        active = self.active.tolist()
        slots = [slot for slot, request in enumerate(self.requests) if request is not None and not active[slot]]
        if not slots:
            return []
        rows = torch.tensor(slots, device=self.rows.device)
        counts = self.generated[rows].tolist()
        responses = self.responses[rows, : max(counts)].tolist()
        logprobs: list[list[float]] | None = None
        if self.logprobs is not None:
            logprobs = self.logprobs[rows, : max(counts)].tolist()
        rollouts = []
        for number, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            request = self.requests[slot]
            assert request is not None
            chosen = None if logprobs is None else tuple(logprobs[number][:count])
            rollouts.append((request.order, self._rollout(request, tuple(responses[number][:count]), chosen)))
            self.requests[slot] = None
        return rollouts

    def compact(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Move the last rows into the free slots below them.

        Returns:
            (sources, targets), slots [n] int64, so that the KV cache can move its rows too; None if no row moves.
        """
        remaining = self.count
        targets = [slot for slot in range(remaining) if self.requests[slot] is None]
        sources = [slot for slot in range(remaining, self.size) if self.requests[slot] is not None]
        if not targets:
            return None
        for source, target in zip(sources, targets, strict=True):
            self.requests[target], self.requests[source] = self.requests[source], None
            self.first_steps[target] = self.first_steps[source]
        source_rows, target_rows = (torch.tensor(slots, device=self.rows.device) for slots in (sources, targets))
        states = [self.tokens, self.positions, self.generated, self.limits, self.active, self.responses, self.numbers]
        for state in (*states, *([] if self.logprobs is None else [self.logprobs])):
            state[target_rows] = state[source_rows]
        return source_rows, target_rows

    def _rollout(self, request: Request, response: Sequence[int], logprobs: tuple[float, ...] | None) -> Rollout:
        return Rollout(
            prompt_ids=tuple(request.prompt.prompt_ids),
            response_ids=tuple(response),
            response_mask=(1,) * len(response),
            finish_reason="eos" if response[-1] in self.eos_token_ids else "length",
            prompt_index=request.prompt.index,
            sample_index=request.sample_index,
            data_source=request.prompt.data_source,
            teacher_prompt_ids=request.prompt.teacher_prompt_ids,
            logprobs=logprobs,
        )
