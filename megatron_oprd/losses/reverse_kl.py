"""The reverse KL divergence of next-token distributions as an autograd function of the hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_oprd.losses.divergence import reverse_kl
from megatron_oprd.losses.lm_head import default_chunk_tokens, logits_of
from megatron_oprd.losses.vocabulary import VocabularyShard


def reverse_kl_from_hidden(
    student_states: Tensor,
    teacher_states: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return KL(p || q) of each token, [N] in float32 at least (OPRD eq. (4)).

    p = softmax(student_states @ student_head^T) and q = softmax(teacher_states @ teacher_head^T). Gradients flow to
    `student_states` and `student_head`. Logits exist for `chunk_tokens` tokens at a time; backward computes them again,
    and needs one float32 buffer of the size of `student_head`.

    Args:
        student_states: [N, d_S], final hidden states (after the final norm), the same on every rank of `group`. Under
            sequence parallelism gather them first, with Megatron-Core's
            gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False).
        teacher_states: [N, d_T], the teacher's states at the same tokens.
        student_head: [rows of the student, d_S], the rows of the LM head on this rank.
        teacher_head: [rows, d_T], the teacher's rows for the same token ids, without padding. Rows that only
            `student_head` has are padding and get no probability.
        group: the tensor-parallel group over which the vocabulary is divided; None: this rank has all of it.
        chunk_tokens: tokens whose logits exist at one time; None: as many as fill 128 MiB.

    Raises:
        ValueError: `teacher_head` has more rows than `student_head`.

    Communicates over `group`: 3 all_reduces for each chunk, in forward and again in backward, where one more sums the
    gradient of the states.
    """
    if len(teacher_head) > len(student_head):
        raise ValueError(
            f"reverse_kl_from_hidden: teacher_head has {len(teacher_head)} rows, student_head {len(student_head)}; "
            "remove from teacher_head the padding and the token ids that the student does not have"
        )
    size = chunk_tokens or default_chunk_tokens(len(student_head))
    shard = VocabularyShard(group=group)
    value: Tensor = _ReverseKL.apply(student_states, student_head, teacher_states, teacher_head, shard, size)
    return value


class _ReverseKL(torch.autograd.Function):
    """KL(p || q). Forward keeps the states only; backward computes the logits of each chunk a second time."""

    @staticmethod
    def forward(
        ctx: Any,
        student_states: Tensor,
        student_head: Tensor,
        teacher_states: Tensor,
        teacher_head: Tensor,
        shard: VocabularyShard,
        size: int,
    ) -> Tensor:
        tensors = (student_states, student_head, teacher_states, teacher_head)
        ctx.save_for_backward(*tensors)
        ctx.shard, ctx.size = shard, size
        values = [value for _, value, _ in _chunks(tensors, shard, size)]
        return torch.cat(values) if values else student_states.new_zeros(0, dtype=_wide(student_states))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        student_states, student_head, _, teacher_head = ctx.saved_tensors
        for_states = torch.zeros_like(student_states)
        for_head = torch.zeros_like(student_head, dtype=_wide(student_head)) if ctx.needs_input_grad[1] else None
        rows = len(teacher_head)
        for chunk, _, gradient in _chunks(ctx.saved_tensors, ctx.shard, ctx.size):
            for_logits = gradient.mul_(upstream[0][chunk, None].to(gradient.dtype)).to(student_states.dtype)
            for_states[chunk] = for_logits @ student_head[:rows]
            if for_head is not None:
                for_head[:rows] += for_logits.t() @ student_states[chunk]
        # The rows of each rank contribute a part of the gradient of the states, and all of that of their own head.
        ctx.shard.sum(for_states)
        return for_states, None if for_head is None else for_head.to(student_head.dtype), None, None, None, None


def _chunks(tensors: tuple[Tensor, ...], shard: VocabularyShard, size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each chunk of tokens, its values [n] and their gradients [n, rows] for the student's logits."""
    student_states, student_head, teacher_states, teacher_head = tensors
    for start in range(0, len(student_states), size):
        chunk = slice(start, start + size)
        log_p = logits_of(student_states[chunk], student_head[: len(teacher_head)])
        log_q = logits_of(teacher_states[chunk], teacher_head)
        shard.normalize_(log_p, log_q)
        yield chunk, *reverse_kl(log_p, log_q, shard)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
