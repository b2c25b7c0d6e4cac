"""Refuse what a vLLM server cannot do, before any work starts."""

from __future__ import annotations

import re

from megatron_oprd.hf.names import QWEN3_NEXT
from megatron_oprd.model_spec import LongRope, ModelSpec, YarnScaling
from megatron_oprd.rollout.server_answers import excluded_ids
from megatron_oprd.rollout.server_client import GenerateRequest, RequestRefused, ServerClient, ServerError
from megatron_oprd.types import UserError

OLDEST_VLLM = (0, 32)  # the first version whose answers name their weight versions and whose tests passed


def check_student(spec: ModelSpec, vocab_size: int, longest_row: int) -> None:
    """Raise UserError if vLLM would sample from another distribution than the student's. No communication.

    Args:
        vocab_size: only token ids below it may be sampled.
        longest_row: most tokens of a prompt and its answer.
    """
    if spec.linear_layers and spec.architecture != QWEN3_NEXT:
        raise UserError(
            f"rollout.engine=vllm does not support {spec.architecture}: vLLM needs torchvision for Qwen3.5, for text "
            "too, and has not been tried with it; use rollout.engine=megatron"
        )
    excluded_ids(spec, vocab_size)
    scaling = spec.rope_scaling
    if isinstance(scaling, LongRope) and longest_row > scaling.original_positions:
        raise UserError(
            f"rollout.engine=vllm uses the long LongRoPE factors for every prompt if any row may exceed "
            f"{scaling.original_positions} tokens, and the longest has {longest_row}; lower rollout.max_new_tokens or "
            "data.max_prompt_tokens, or use rollout.engine=megatron"
        )
    if isinstance(scaling, YarnScaling) and longest_row > (angles := int(scaling.factor * scaling.original_positions)):
        raise UserError(
            f"rollout.engine=vllm has rotary angles for factor * original_max_position_embeddings = {angles} tokens "
            f"under YaRN, whatever max_position_embeddings is, and the longest row has {longest_row}; lower "
            "rollout.max_new_tokens or data.max_prompt_tokens, or use rollout.engine=megatron"
        )


def check_server(client: ServerClient, spec: ModelSpec, longest_row: int) -> None:
    """Raise UserError if a running server does not suit the student.

    The names and the shapes of the weights are compared by the first transfer.

    Args:
        longest_row: most tokens of a prompt and its answer.
    """
    try:
        _check_version(client)
        _check_lengths(client, spec, longest_row)
        _check_development_mode(client)
        # A run that was killed during a transfer leaves its server paused. A request would wait, or end an engine in
        # the middle of an update. The next transfer and its canary find another model too.
        if not client.is_paused():
            _check_vocabulary(client, spec)
    except ServerError as error:
        raise UserError(f"rollout.server.addresses: {error}") from None


def _check_version(client: ServerClient) -> None:
    version = client.version()
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_VLLM:
        oldest = ".".join(map(str, OLDEST_VLLM))
        raise ServerError(
            f"{client.address}: the server runs vLLM {version}; {oldest} or later is needed; install it there"
        )


def _check_lengths(client: ServerClient, spec: ModelSpec, longest_row: int) -> None:
    limit = client.max_model_len()
    if limit < longest_row:
        raise ServerError(
            f"{client.address}: the server accepts {limit} tokens, and the longest prompt with "
            f"rollout.max_new_tokens has {longest_row}; start it with --max-model-len {longest_row}"
        )
    scaling = spec.rope_scaling
    if isinstance(scaling, LongRope) and limit > scaling.original_positions:
        raise ServerError(
            f"{client.address}: the server accepts {limit} tokens and therefore uses the long LongRoPE factors for "
            f"every prompt; start it with --max-model-len {scaling.original_positions}"
        )


def _check_development_mode(client: ServerClient) -> None:
    try:
        client.weight_info()
    except RequestRefused:
        raise ServerError(
            f"{client.address}: the server accepts no weights; start it with VLLM_SERVER_DEV_MODE=1"
        ) from None


def _check_vocabulary(client: ServerClient, spec: ModelSpec) -> None:
    """Generate one token with the last id of the vocabulary as a stop id, and expect that the next id is refused.

    The only token of top-k 1 has the log-probability 0, unless the server reports it before top-k.
    """
    size, answer, other = spec.vocab_size, None, "the server has another model: its vocabulary has"
    try:
        answer = client.generate(GenerateRequest((0,), 1, 0, top_k=1, stop_ids=(size - 1,), logprobs=True))
        client.generate(GenerateRequest((0,), 1, 0, stop_ids=(size,)))
    except RequestRefused as error:
        if "--enable-scale-out" in str(error) or "status 403" in str(error):
            raise ServerError(f"{error}; start the server with --enable-scale-out") from None
        if "out-of-vocab" not in str(error):
            raise
        if answer is None:
            raise ServerError(
                f"{client.address}: {other} fewer than the student's {size} ids; start it with student.path"
            ) from None
    else:
        raise ServerError(f"{client.address}: {other} more than the student's {size} ids; start it with student.path")
    if answer is None or not answer.logprobs or abs(answer.logprobs[0]) > 1e-3:
        raise ServerError(
            f"{client.address}: log-probabilities ignore the sampling; start the server with --logprobs-mode "
            "processed_logprobs"
        )
