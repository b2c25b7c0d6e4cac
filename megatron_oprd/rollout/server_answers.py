"""The requests to a vLLM server that depend on the run, and the checks of its answers. No communication."""

from __future__ import annotations

import math

import numpy as np

from megatron_oprd.model_spec import ModelSpec
from megatron_oprd.rollout.server_client import Answer, GenerateRequest
from megatron_oprd.types import UserError

MOST_EXCLUDED = 1024  # biased logits of one request that vLLM accepts


def excluded_ids(spec: ModelSpec, vocab_size: int | None) -> tuple[int, ...]:
    """Return the student's token ids from `vocab_size` on, which must not be sampled.

    Raises:
        UserError: there are more than vLLM can exclude.
    """
    excluded = spec.vocab_size - min(vocab_size or spec.vocab_size, spec.vocab_size)
    if excluded > MOST_EXCLUDED:
        raise UserError(
            f"rollout.engine=vllm cannot exclude the {excluded} token ids of the student that a teacher lacks, only "
            f"{MOST_EXCLUDED}; use rollout.engine=megatron"
        )
    return tuple(range(spec.vocab_size - excluded, spec.vocab_size))


def request_seed(seed: int, step: int, prompt_index: int, sample_index: int) -> int:
    """Return the seed of one rollout, from 0 to 2^63 - 1. It depends on the arguments only."""
    state = np.random.SeedSequence([seed, step, prompt_index, sample_index]).generate_state(1, np.uint64)
    return int(state[0]) >> 1


def answer_problem(request: GenerateRequest, answer: Answer, *, label: str, vocab_size: int) -> str | None:
    """Return why an answer must not be used, or None.

    Args:
        label: the only weight version that may have sampled it.
        vocab_size: the student's number of token ids.
    """
    ids, length = answer.token_ids, len(answer.token_ids)
    if answer.finish_reason not in ("stop", "length"):
        return f"an answer ended with the finish reason {answer.finish_reason!r}"
    if not 1 <= length <= request.max_new_tokens:
        return f"an answer has {length} tokens; {request.max_new_tokens} were requested"
    if min(ids) < 0 or max(ids) >= vocab_size or not set(ids).isdisjoint(request.excluded_ids):
        return f"an answer has token ids that must not be sampled, up to {max(ids)}"
    stops = [place for place, token in enumerate(ids) if token in request.stop_ids]
    if answer.finish_reason == "stop" and stops != [length - 1]:
        return "an answer does not end with its first end-of-sequence token"
    if answer.finish_reason == "length" and (length < request.max_new_tokens or stops):
        return f"an answer ended at {length} of {request.max_new_tokens} tokens"
    spans = [(span.version, span.start, span.end) for span in answer.weight_versions]
    if spans != [(label, 0, length)]:
        return f"an answer of {length} tokens has the weight versions {spans}; only {label} is current"
    if request.logprobs:
        values = answer.logprobs or ()
        if len(values) != length or not all(math.isfinite(value) and value < 1e-3 for value in values):
            return "an answer has wrong log-probabilities"
    return None
