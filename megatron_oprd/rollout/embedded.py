"""The embedded rollout engine: generate with the student's training weights, a KV cache and continuous batching."""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.model import Stage
from megatron_oprd.parallel.collectives import max_over
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.decoder import Decoder
from megatron_oprd.rollout.engine import ImmediateEngine, Sampling
from megatron_oprd.rollout.inference_mode import (
    without_fp8,
    without_linear_autograd,
    without_sequence_parallelism,
)
from megatron_oprd.rollout.longrope_refill import refill_crossing_rows
from megatron_oprd.rollout.requests import Request, make_requests
from megatron_oprd.rollout.slots import Slots
from megatron_oprd.runtime import progress
from megatron_oprd.types import Prompt, Rollout

# After so many passes the host asks which rows ended, for which it waits for the device.
PASSES_BETWEEN_LOOKS = {"cpu": 1, "cuda": 8}
PROMPT_TOKENS_PER_STEP = 8192  # limits the activations of prefill; a longer prompt is still processed in one pass


class EmbeddedEngine(ImmediateEngine):
    """Generates rollouts with this rank's part of the student, at most `max_batch` rows per replica at a time.

    Each pass is a decode step, one token for each row, or a packed pass over the prompts of rows that start. The slot
    of a row that ended is free for a prompt as soon as the host has asked for it.

    Memory: the caches exist only during `generate`: `rollout_cache_bytes` for `max_batch` rows of the longest length.

    Parallelism: pipeline stages work at the same time on different groups of rows. Context-parallel ranks are separate
    replicas. With expert parallelism over replicas, all replicas run the same number of passes; a replica without work
    passes one unused token through the experts.

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
        self.stage.wait_for_parameters()  # decode steps use the weights outside their modules
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
        return [rollouts[request.order] for request in requests]

    def _run(self, requests: Sequence[Request], step: int) -> Iterator[tuple[int, Rollout]]:
        """Yield each rollout when it ends, with its index in the result, until no request is left."""
        waiting, device = deque(requests), self.topology.device
        longest_answer = max((request.max_new_tokens for request in requests), default=1)
        rows = min(self.max_batch, len(requests))
        slots = Slots(rows, longest_answer, self.spec.eos_token_ids, device, logprobs=self.sampling.logprobs)
        length = max((request.longest for request in requests), default=1)
        decoder = Decoder(self.stage, self.spec, self.topology, self.sampling, slots, length, self.vocab_size)
        passes = 0  # since the host last asked which rows ended
        while self._any_replica_has_work(bool(waiting or slots.count)):
            progress.beat()
            if not (waiting or slots.count):
                decoder.idle()
                continue
            starting = slots.admit(waiting, PROMPT_TOKENS_PER_STEP, self.seed, step)
            if starting:
                decoder.prefill([(prompt.prompt_ids, samples) for prompt, samples in starting])
            else:
                refill_crossing_rows(decoder, self.spec, PROMPT_TOKENS_PER_STEP)
                decoder.decode()
            passes += 1
            if passes >= PASSES_BETWEEN_LOOKS[device.type] or slots.all_at_their_limit:
                decoder.finish()
                yield from slots.collect()
                passes = 0
                if not waiting:
                    decoder.compact()

    def _any_replica_has_work(self, has_work: bool) -> bool:
        """Return True if this replica, or one that shares experts with it, has work left.

        The result is equal on all ranks of a replica, since each group over replicas has one rank of every replica.
        """
        if not self.spec.num_experts or self.topology.expert_size == 1:
            return has_work
        return max_over([has_work], self.topology.groups.dp_cp, self.topology.device)[0] > 0


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
