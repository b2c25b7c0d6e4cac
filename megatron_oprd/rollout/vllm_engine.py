"""The rollout engine that generates with vLLM servers, which receive the student's weights after each update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.parallel.rank_zero import RankZeroFailed
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import Sampling
from megatron_oprd.rollout.requests import Request, make_requests
from megatron_oprd.rollout.server_answers import answer_problem, excluded_ids, request_seed
from megatron_oprd.rollout.server_client import Answer, GenerateRequest, ServerError
from megatron_oprd.rollout.server_pool import PendingAnswers, ServerPool
from megatron_oprd.runtime import progress
from megatron_oprd.types import Prompt, Rollout, UserError

BEAT_SECONDS = 2.0  # between two signs of life of the ranks that wait for answers


class WeightTransfer(Protocol):
    """Sends the student's weights to the servers."""

    @property
    def label(self) -> str:
        """The version that servers report for the weights of the last `push`."""
        ...

    def push(self, version: int) -> dict[str, float]:
        """Send the student's present weights to all servers, and return metrics. Collective over the world.

        Args:
            version: number of updates that the weights have seen.
        """
        ...


class VllmEngine:
    """Generates rollouts with vLLM servers.

    The first rank of each model replica sends its requests from threads of its own, while the ranks do other work.
    `PendingRollouts.result` then shares the answers inside the replica.

    Args:
        pool: the servers, on the first rank of each replica; None on other ranks.
        vocab_size: only token ids below it are sampled (default: all of the student's). A teacher may have fewer ids.
    """

    def __init__(
        self,
        spec: ModelSpec,
        topology: Topology,
        sampling: Sampling,
        transfer: WeightTransfer,
        pool: ServerPool | None,
        *,
        seed: int,
        vocab_size: int | None = None,
    ) -> None:
        self.spec = spec
        self.topology = topology
        self.sampling = sampling
        self.transfer = transfer
        self.pool = pool
        self.seed = seed
        self.excluded_ids = excluded_ids(spec, vocab_size)

    def sync_weights(self, version: int) -> dict[str, float]:
        """Send the student's present weights to all servers, and return metrics of the transfer.

        Nothing may be pending. Collective over the world.

        Args:
            version: number of updates that the weights have seen.
        """
        metrics = self.transfer.push(version)
        if self.pool is not None:
            self.pool.readmit()
        return metrics

    def submit(
        self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None
    ) -> PendingServerRollouts:
        """Start the rollouts of a training step with the weights of the last `sync_weights`, and return at once.

        All ranks of a replica pass the same prompts.

        Args:
            limits: most tokens of a response to each prompt, in place of `Sampling.max_new_tokens`.

        Raises:
            UserError: a prompt is empty, has a token id that the student lacks, or leaves no position for an answer.
        """
        requests = make_requests(prompts, self.spec, self.sampling, limits)
        for prompt in prompts:
            largest = max(prompt.prompt_ids)
            if largest >= self.spec.vocab_size:
                raise UserError(
                    f"prompt {prompt.index} has the token id {largest}; the student has {self.spec.vocab_size} "
                    "ids; use the tokenizer that belongs to the student"
                )
        answers = None
        if self.pool is not None:
            check = partial(answer_problem, label=self.transfer.label, vocab_size=self.spec.vocab_size)
            answers = self.pool.start([self._generate_request(request, step) for request in requests], check)
        return PendingServerRollouts(requests, answers, self.topology)

    def generate(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> list[Rollout]:
        """Return the rollouts of a training step, ordered by prompt and then by sample, from sample 0."""
        return self.submit(prompts, step, limits).result()

    def _generate_request(self, request: Request, step: int) -> GenerateRequest:
        sampling = self.sampling
        return GenerateRequest(
            request.prompt.prompt_ids,
            request.max_new_tokens,
            request_seed(self.seed, step, request.prompt.index, request.sample_index),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
            self.spec.eos_token_ids,
            self.excluded_ids,
            sampling.logprobs,
        )


class PendingServerRollouts:
    """Rollouts that servers generate beside other work. `answers` is None except on the first rank of a replica."""

    def __init__(self, requests: Sequence[Request], answers: PendingAnswers | None, topology: Topology) -> None:
        self._requests = requests
        self._answers = answers
        self._topology = topology
        self._rollouts: list[Rollout] | None = None

    def result(self) -> list[Rollout]:
        """Wait for the rollouts and return them, ordered by prompt and then by sample, from sample 0.

        Communicates over: the tensor- and the pipeline-parallel group, at the first call.

        Raises:
            ServerError: generation failed, on the first rank of the replica.
            RankZeroFailed: generation failed, on the other ranks.
        """
        if self._rollouts is None:
            answers = self._wait()
            self._rollouts = [
                _rollout(request, answer) for request, answer in zip(self._requests, answers, strict=True)
            ]
        return self._rollouts

    def _wait(self) -> list[Answer]:
        while True:
            progress.beat()  # the watchdog must not take a rank that waits for one that hangs
            failure, message = None, ("waiting", None)
            if self._answers is not None and self._answers.wait(BEAT_SECONDS):
                try:
                    message = ("answers", self._answers.result())
                except ServerError as error:
                    failure, message = error, ("failed", str(error))
            kind, value = _broadcast_in_replica(message, self._topology)
            if failure is not None:
                raise failure from None
            if kind == "failed":
                raise RankZeroFailed(f"the first rank of the replica failed: {value}")
            if kind == "answers":
                return value


def is_first_of_replica(topology: Topology) -> bool:
    """Return True on the rank of each replica that talks to the servers."""
    return topology.tensor_rank == 0 and topology.pipeline_rank == 0


def _rollout(request: Request, answer: Answer) -> Rollout:
    prompt = request.prompt
    return Rollout(
        prompt.prompt_ids,
        answer.token_ids,
        (1,) * len(answer.token_ids),
        "eos" if answer.finish_reason == "stop" else "length",
        prompt_index=prompt.index,
        sample_index=request.sample_index,
        data_source=prompt.data_source,
        teacher_prompt_ids=prompt.teacher_prompt_ids,
        logprobs=answer.logprobs,
    )


def _broadcast_in_replica(value: Any, topology: Topology) -> Any:
    """Return the picklable value of the first rank of the replica on all of its ranks.

    Communicates over: the tensor-parallel group, then the pipeline-parallel group.
    """
    message = [value]
    for size, group in ((topology.tensor_size, topology.groups.tp), (topology.pipeline_size, topology.groups.pp)):
        if size > 1:
            dist.broadcast_object_list(message, src=dist.get_global_rank(group, 0), group=group)
    return message[0]
