"""The canary: fixed tokens scored by a server and by the student, whose log-probabilities must agree.

The comparison finds what no checksum of the weights can: a packed copy of a weight that was not renewed, keys and
values of old weights in the prefix cache, a server of another model.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.models.micro_batch import MicroBatch
from megatron_oprd.models.model import Stage
from megatron_oprd.models.pipeline import gather_vocabulary, pass_through
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.inference_mode import without_fp8, without_linear_autograd, without_sequence_parallelism
from megatron_oprd.rollout.server_client import GenerateRequest, ServerClient

# The longest prompt fills at least one block of the prefix cache, which has 16 to 128 tokens.
PROMPT_LENGTHS = (7, 40, 150)
ANSWER_TOKENS = 4
# Largest mean absolute difference of log-probabilities, in nats. In bf16 a logit near 16 is rounded by up to 0.06.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.15}


@dataclass(frozen=True)
class ScoredTokens:
    """A prompt and a greedy answer, with the log-probability of each token but the first."""

    token_ids: tuple[int, ...]
    prompt_length: int
    logprobs: tuple[float, ...]  # [tokens - 1]


def canary_prompts(vocab_size: int, longest: int) -> list[tuple[int, ...]]:
    """Return the fixed prompts, none of which has more than `longest` tokens, with ids spread over the vocabulary."""
    step = max(vocab_size * 5 // 13, 1) | 1
    return [
        tuple((31 * number + step * position) % vocab_size for position in range(min(length, longest)))
        for number, length in enumerate(PROMPT_LENGTHS)
    ]


def score_by_server(client: ServerClient, vocab_size: int) -> list[ScoredTokens]:
    """Return the fixed prompts with the server's answers and log-probabilities. Raises ServerError.

    An answer is generated before its prompt is scored: scoring computes all keys and values anew, and generation would
    find the new ones in the prefix cache.
    """
    scored = []
    for prompt in canary_prompts(vocab_size, client.max_model_len() - ANSWER_TOKENS):
        # Ids beyond the student's vocabulary are padding of the server's model.
        answer = client.generate(GenerateRequest(prompt, ANSWER_TOKENS, seed=0, temperature=0.0, logprobs=True))
        assert answer.logprobs is not None
        logprobs = (*client.score(prompt), *answer.logprobs)
        scored.append(ScoredTokens((*prompt, *answer.token_ids), len(prompt), logprobs))
    return scored


def score_by_student(
    stage: Stage, spec: ModelSpec, topology: Topology, sequences: Sequence[Sequence[int]]
) -> list[list[float]]:
    """Return the log-probability of each token of each sequence but the first, at temperature 1, in float32.

    The sequences are the same on every rank, and so are the results. Collective over the world.

    Communicates over: the tensor- and the pipeline-parallel group, and the groups of the experts.
    """
    device, lengths = topology.device, [len(sequence) for sequence in sequences]
    tokens = torch.tensor(list(itertools.chain.from_iterable(sequences)), device=device)
    batch = MicroBatch(
        position_ids=torch.cat([torch.arange(length, device=device) for length in lengths]),
        lengths=torch.tensor([length for length in lengths for _ in range(length)], device=device),
        bounds=tuple(itertools.accumulate(lengths, initial=0)),
        logit_rows=torch.arange(len(tokens), device=device),
    )
    with _inference(stage):
        logits = pass_through(stage, topology, tokens, batch)
        logprobs = torch.empty(len(tokens), dtype=torch.float32, device=device)
        if logits is not None:
            logits = gather_vocabulary(logits, topology, spec.vocab_size).float()
            following = tokens.roll(-1)[:, None]  # of the last token of a sequence: not used
            logprobs = logits.gather(1, following)[:, 0] - logits.logsumexp(1)
    if topology.pipeline_size > 1:
        last = dist.get_global_rank(topology.groups.pp, topology.pipeline_size - 1)
        dist.broadcast(logprobs, last, group=topology.groups.pp)
    return [values[:-1] for values in _split(logprobs.tolist(), lengths)]


def largest_difference(server: Sequence[ScoredTokens], student: Sequence[ScoredTokens]) -> float:
    """Return the largest mean absolute difference of log-probabilities over a prompt or over an answer.

    The student has scored each prompt with at least one answer. Of an answer that it has not scored, the tokens up to
    the first different one are compared.
    """
    differences = []
    for scored in server:
        common, expected = max(
            ((_common_tokens(scored.token_ids, one.token_ids), one) for one in student), key=lambda pair: pair[0]
        )
        pairs = list(zip(scored.logprobs, expected.logprobs, strict=False))[: common - 1]
        cut = scored.prompt_length - 1
        differences += [_mean_difference(part) for part in (pairs[:cut], pairs[cut:]) if part]
    return max(differences, key=lambda difference: math.inf if math.isnan(difference) else difference)


def _common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of equal tokens before the first different one."""
    equal = (one == other for one, other in zip(first, second, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, equal))


def _mean_difference(pairs: Sequence[tuple[float, float]]) -> float:
    return sum(abs(first - second) for first, second in pairs) / len(pairs)


def _split(values: list[float], lengths: Sequence[int]) -> Iterator[list[float]]:
    bounds = itertools.accumulate(lengths, initial=0)
    return (values[start:end] for start, end in itertools.pairwise(bounds))


@contextlib.contextmanager
def _inference(stage: Stage) -> Iterator[None]:
    """Run the stage inside the block as generation does, and leave it as it was."""
    training = stage.training
    stage.eval()
    try:
        with (
            torch.inference_mode(),
            without_sequence_parallelism(stage),
            without_fp8(stage),
            without_linear_autograd(stage),
        ):
            yield
    finally:
        stage.train(training)
        for chunk in stage:
            chunk.set_input_tensor(None)
