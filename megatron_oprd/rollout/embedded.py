"""The embedded rollout engine: generate with the student's training weights, a KV cache and continuous batching."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_oprd.models.kv_cache import CachedStep, KeyValueCache
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import gather_vocabulary, pass_through
from megatron_oprd.parallel.collectives import max_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import ImmediateEngine, Sampling
from megatron_oprd.rollout.inference_mode import (
    without_fp8,
    without_linear_autograd,
    without_sequence_parallelism,
)
from megatron_oprd.rollout.longrope_refill import refill_crossing_rows
from megatron_oprd.rollout.requests import Request, make_requests
from megatron_oprd.rollout.sampling import sample
from megatron_oprd.rollout.slots import Slots
from megatron_oprd.runtime import progress
from megatron_oprd.types import ModelSpec, Prompt, Rollout

PROMPT_TOKENS_PER_STEP = 8192  # limits the activations of prefill; a longer prompt is still processed in one pass


class EmbeddedEngine(ImmediateEngine):
    """Generates rollouts with this rank's part of the student, at most `max_batch` rows per replica at a time.

    Each step is one forward pass that decodes one token of every active row and prefills the prompts that start.
    The slot of a row that ends is free for a prompt in the next step.

    Memory: the KV cache exists only during `generate`. It has `max_batch` rows of the longest length, with
    2 * layers * key-value heads * head size * itemsize bytes per token. Layers and heads are those of one rank.

    Parallelism: pipeline stages work one after the other on each token. Context-parallel ranks are separate replicas.
    With expert parallelism over replicas, all replicas run the same number of steps; a replica without work passes
    one unused token through the experts.

    Args:
        vocab_size: only token ids below it are sampled (default: all of the student's). A teacher may have fewer ids.
        progress: show a progress bar on a terminal.
    """

    def __init__(
        self,
        stage: Stage,
        spec: ModelSpec,
        topology: Topology,
        sampling: Sampling,
        *,
        seed: int,
        max_batch: int = 64,
        vocab_size: int | None = None,
        progress: bool = False,
    ) -> None:
        self.stage = stage
        self.spec = spec
        self.topology = topology
        self.sampling = sampling
        self.seed = seed
        self.max_batch = max_batch
        self.vocab_size = spec.vocab_size if vocab_size is None else min(vocab_size, spec.vocab_size)
        self.progress = progress

    def generate(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> list[Rollout]:
        """Return the rollouts of a training step, ordered by prompt and then by sample.

        All ranks of a replica pass the same prompts and receive the same rollouts. With expert parallelism over
        replicas, all replicas must call this at the same time, if necessary without prompts.

        Args:
            limits: most tokens of a response, one for each prompt; replaces `max_new_tokens`.

        Raises:
            UserError: a prompt is empty or leaves no position for an answer.

        Communicates over: the tensor- and the pipeline-parallel group, and the groups of the experts.
        """
        requests = make_requests(prompts, self.spec, self.sampling, limits)
        rollouts: dict[int, Rollout] = {}
        training = self.stage.training
        self.stage.eval()
        try:
            with (
                torch.inference_mode(),
                without_sequence_parallelism(self.stage),
                without_fp8(self.stage),
                without_linear_autograd(self.stage),
                _progress(len(requests), self.progress) as advance,
            ):
                for order, rollout in self._run(requests, step):
                    rollouts[order] = rollout
                    advance(len(rollout.response_ids))
        finally:
            self.stage.train(training)
            for chunk in self.stage:
                chunk.set_input_tensor(None)
        return [rollouts[request.order] for request in requests]

    def _run(self, requests: Sequence[Request], step: int) -> Iterator[tuple[int, Rollout]]:
        """Yield each rollout when it ends, with its index in the result, until no request is left."""
        waiting = deque(requests)
        device, dtype = self.topology.device, self.stage.config.params_dtype
        longest_answer = max((request.max_new_tokens for request in requests), default=1)
        slots = Slots(min(self.max_batch, len(requests)), longest_answer, self.spec.eos_token_ids, device)
        cache = self._cache(slots.size)
        while self._any_replica_has_work(bool(waiting or slots.count)):
            progress.beat()
            if not (waiting or slots.count):
                pass_through(self.stage, self.topology, *_idle_micro_batch(device))
                continue
            refill_crossing_rows(self.stage, self.spec, self.topology, slots, cache, PROMPT_TOKENS_PER_STEP)
            decoding = slots.count
            starting = self._admit(waiting, slots, step)
            cache.reserve(max([slots.longest, *(len(prompt.prompt_ids) for prompt, _ in starting)]))
            step_input = _micro_batch(slots, cache, decoding, starting, dtype)
            output = pass_through(self.stage, self.topology, *step_input)
            ended = slots.append(self._sample(output, slots))
            moves = None
            if ended.any():
                yield from slots.rollouts(ended)
                moves = slots.compact(ended)
                slots.update_lengths()
            elif starting:
                slots.update_lengths()
            if moves is not None:
                cache.move(*moves, slots.longest)

    def _any_replica_has_work(self, has_work: bool) -> bool:
        """Return True if this replica, or one that shares experts with it, has work left.

        The result is equal on all ranks of a replica, since each group over replicas has one rank of every replica.
        """
        if not self.spec.num_experts or self.topology.expert_size == 1:
            return has_work
        return max_over([has_work], self.topology.groups.dp_cp, self.topology.device)[0] > 0

    def _cache(self, slots: int) -> KeyValueCache:
        return KeyValueCache(
            [
                layer.self_attention.core_attention.layer_number
                for chunk in self.stage
                for layer in chunk.decoder.layers
            ],
            slots,
            self.spec.num_query_groups // self.topology.tensor_size,
            self.spec.head_dim,
            self.stage.config.params_dtype,
            self.topology.device,
        )

    def _admit(self, waiting: deque[Request], slots: Slots, step: int) -> list[tuple[Prompt, list[int]]]:
        """Assign free slots to waiting requests. Return the prompts to prefill, each with the slots of its samples."""
        starting: list[tuple[Prompt, list[int]]] = []
        prompt_tokens = 0
        while waiting and slots.free:
            request = waiting[0]
            if not starting or starting[-1][0] is not request.prompt:
                prompt_tokens += len(request.prompt.prompt_ids)
                if starting and prompt_tokens > PROMPT_TOKENS_PER_STEP:
                    break
                starting.append((request.prompt, []))
            starting[-1][1].append(slots.admit(waiting.popleft(), self.seed, step))
        return starting

    def _sample(self, logits: torch.Tensor | None, slots: Slots) -> torch.Tensor:
        """Return the next token of each row, [rows] int64, equal on every rank of the replica.

        Args:
            logits: the result of `pass_through`; None on stages without the LM head.

        Communicates over: the tensor- and the pipeline-parallel group.
        """
        topology = self.topology
        if logits is None:
            tokens = slots.tokens.new_empty(slots.count)
        else:
            logits = gather_vocabulary(logits, topology, self.vocab_size)
            tokens = sample(logits, self.sampling, slots.next_numbers())
            if topology.tensor_size > 1:
                # GPU sums may differ in the last bit between ranks. With different tokens, the ranks would deadlock.
                dist.broadcast(tokens, dist.get_global_rank(topology.groups.tp, 0), group=topology.groups.tp)
        if topology.pipeline_size > 1:
            last = dist.get_global_rank(topology.groups.pp, topology.pipeline_size - 1)
            dist.broadcast(tokens, last, group=topology.groups.pp)
        return tokens


def _idle_micro_batch(device: torch.device) -> tuple[torch.Tensor, MicroBatch]:
    """Return one token without KV cache, which a replica without work passes through the shared experts."""
    token = torch.zeros(1, dtype=torch.int64, device=device)
    return token, MicroBatch(position_ids=token, lengths=token + 1, bounds=(0, 1))


def _micro_batch(
    slots: Slots, cache: KeyValueCache, decoding: int, starting: list[tuple[Prompt, list[int]]], dtype: torch.dtype
) -> tuple[torch.Tensor, MicroBatch]:
    """Return tokens [tokens] and packing of one step: the last token of `decoding` rows, then the starting prompts.

    The logit rows are in the order of the slots.
    """
    device = slots.rows.device
    rows, positions = slots.rows[:decoding], slots.positions[:decoding]
    mask = None
    if decoding and slots.ragged:
        beyond = torch.arange(slots.longest, device=device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=device).masked_fill_(beyond, -torch.inf)[:, None, None]
    bounds = tuple(itertools.accumulate((len(prompt.prompt_ids) for prompt, _ in starting), initial=decoding))
    prompt_slots = tuple(torch.tensor(samples, device=device) for _, samples in starting)
    step = CachedStep(cache, decoding, rows, positions, slots.longest, mask, prompt_slots)
    tokens, lengths, logit_rows = slots.tokens[:decoding], positions + 1, rows
    if starting:
        prompt_ids = [token for prompt, _ in starting for token in prompt.prompt_ids]
        prompt_positions = [place for prompt, _ in starting for place in range(len(prompt.prompt_ids))]
        prompt_lengths = [len(prompt.prompt_ids) for prompt, _ in starting for _ in prompt.prompt_ids]
        last_rows = [end - 1 for (_, samples), end in zip(starting, bounds[1:], strict=True) for _ in samples]
        before = tokens, positions, lengths, logit_rows
        new = prompt_ids, prompt_positions, prompt_lengths, last_rows
        tokens, positions, lengths, logit_rows = (
            torch.cat((old, torch.tensor(added, device=device))) for old, added in zip(before, new, strict=True)
        )
    batch = MicroBatch(position_ids=positions, lengths=lengths, bounds=bounds, logit_rows=logit_rows, cache=step)
    return tokens, batch


@contextlib.contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    """Show finished rollouts and tokens per second on standard error, if that is a terminal.

    Yields a function to call with the number of tokens of each finished rollout.
    """
    if not (wanted and sys.stderr.isatty()):
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("rollouts"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
    )
    done = 0
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("rollouts", total=total, rate=0.0)

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            bar.update(task, advance=1, rate=done / max(bar.tasks[0].elapsed or 0.0, 1e-9))

        yield advance
