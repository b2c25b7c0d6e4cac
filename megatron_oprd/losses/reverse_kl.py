"""The reverse KL divergence of next-token distributions as autograd functions of the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_oprd.config import OutputConfig
from megatron_oprd.losses.complete_vocabulary import Logits, complete_objective
from megatron_oprd.losses.divergence import reverse_kl
from megatron_oprd.losses.lm_head import (
    HEAD_ROWS,
    HeadInput,
    Objective,
    add_head_gradient_,
    auto_chunk_tokens,
    logits_gradient,
    slice_tokens,
    slices,
)
from megatron_oprd.losses.vocabulary import VocabularyShard

REVERSE_KL = OutputConfig(objective="full_kl", direction="reverse")


def weighted_reverse_kl(
    student: HeadInput,
    teacher: HeadInput,
    weights: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sum of weights * KL(p || q), and KL(p || q) of each token without gradient (OPRD eq. (4)).

    p = softmax(student.states @ student.head^T) and q = softmax(teacher.states @ teacher.head^T). Gradients of the sum
    flow to `student.states` and `student.head`. Forward computes them with the logits, chunk by chunk; backward only
    multiplies by the incoming scalar. Without autograd, or if neither tensor needs a gradient, none is computed.

    Args:
        student: states [N, d_S] and head [rows of the student, d_S]. The states are the same on every rank of `group`.
            Under sequence parallelism gather them first, with Megatron-Core's
            gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False).
        teacher: states [N, d_T] at the same tokens, and the head's rows [rows, d_T] for the same token ids, without
            padding. Rows that only the student's head has are padding and get no probability.
        weights: [N], without gradient: the factor of each token in the loss.
        group: the tensor-parallel group over which the vocabulary is divided; None: this rank has all of it.
        chunk_tokens: tokens whose logits exist at one time; None: by `auto_chunk_tokens`.

    Returns:
        The sum, a scalar, and the values [N], both in float32 at least.

    Raises:
        ValueError: the teacher's head has more rows than the student's.

    Communicates over `group`: 3 all_reduces for each slice, and one for the gradient of the states, all in forward.
    """
    _check_rows(student.head, teacher.head, "weighted_reverse_kl")
    if not torch.is_grad_enabled():  # inside of an autograd function, this is not known
        student = HeadInput(student.states.detach(), student.head.detach())
    task = _Task(teacher, VocabularyShard(group=group), chunk_tokens)
    total, values = _WeightedReverseKL.apply(student.states, student.head, task, weights)
    return total, values


def reverse_kl_from_hidden(
    student_states: Tensor,
    teacher_states: Tensor,
    student_head: Tensor,
    teacher_head: Tensor,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return KL(p || q) of each token, [N] in float32 at least, with a gradient for each token.

    Backward computes all logits again, because the gradient of the head depends on the incoming gradient of each token.
    `weighted_reverse_kl` computes them once, if the weights of the tokens are known before.

    Args, errors and communication are those of `weighted_reverse_kl`. Backward repeats the all_reduces of each slice.
    """
    _check_rows(student_head, teacher_head, "reverse_kl_from_hidden")
    task = _Task(HeadInput(teacher_states, teacher_head), VocabularyShard(group=group), chunk_tokens)
    value: Tensor = _ReverseKL.apply(student_states, student_head, task)
    return value


@dataclass(frozen=True)
class _Task:
    """The arguments of both functions that have no gradient."""

    teacher: HeadInput
    shard: VocabularyShard
    chunk_tokens: int | None

    def run(
        self, student: HeadInput, weights: Tensor | None = None, needs_gradient: Sequence[bool] = (False, False)
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the values [N], and the gradients of the states and of the head, each only if it is needed."""
        rows, tokens, head = len(self.teacher.head), len(student.states), student.head[: len(self.teacher.head)]
        values = student.states.new_empty(tokens, dtype=_wide(student.states))
        for_states = torch.zeros_like(student.states) if needs_gradient[0] else None
        for_head = torch.zeros_like(student.head, dtype=_wide(student.head)) if needs_gradient[1] else None
        size = self.chunk_tokens or auto_chunk_tokens(len(student.head), student.states.dtype)
        for chunk in slices(tokens, size):
            states, teacher = student.states[chunk], HeadInput(self.teacher.states[chunk], self.teacher.head)
            chunk_weights = None if weights is None else weights[chunk]
            if states.is_cuda:
                objective, size_of_slice = _compiled_objective(self.shard, values[chunk], chunk_weights), None
            else:
                objective = _objective(self.shard, values[chunk], chunk_weights)
                size_of_slice = slice_tokens(len(student.head))
            for_logits = logits_gradient(HeadInput(states, head), teacher, objective, size_of_slice)
            if for_states is not None:
                for_states[chunk] = for_logits @ head
            if for_head is not None:
                add_head_gradient_(for_head[:rows], for_logits, states)
        if for_states is not None:
            # The rows of each rank contribute a part of the gradient of the states, all of that of their own head.
            self.shard.sum(for_states)
        return values, for_states, None if for_head is None else for_head.to(student.head.dtype)


def _objective(shard: VocabularyShard, values: Tensor, weights: Tensor | None) -> Objective:
    """Return the objective of one chunk, which writes its values [n] to `values`."""

    def objective(log_p: Tensor, log_q: Tensor, part: slice) -> Tensor:
        shard.normalize_(log_p, log_q)
        values[part], gradient = reverse_kl(log_p, log_q, shard)
        return gradient if weights is None else gradient.mul_(weights[part, None].to(gradient.dtype))

    return objective


def _compiled_objective(shard: VocabularyShard, values: Tensor, weights: Tensor | None) -> Objective:
    """Return the objective of one chunk for a GPU, which takes logits in the dtype of the states."""

    def objective(student: Tensor, teacher: Tensor, part: slice) -> Tensor:
        scale = torch.ones_like(values) if weights is None else weights
        result = complete_objective(Logits(student), Logits(teacher), None, shard, REVERSE_KL, scale)
        values.copy_(result.value)
        return result.gradient

    return objective


class _WeightedReverseKL(torch.autograd.Function):
    """The weighted sum of KL(p || q), and the values. Forward computes all gradients."""

    @staticmethod
    def forward(
        ctx: Any, student_states: Tensor, student_head: Tensor, task: _Task, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        student = HeadInput(student_states, student_head)
        values, *gradients = task.run(student, weights, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(values)
        return (values * weights.to(values.dtype)).sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if one is None else _multiply(one, upstream[0]) for one in ctx.saved_tensors), None, None


class _ReverseKL(torch.autograd.Function):
    """KL(p || q) of each token. Forward keeps the states only."""

    @staticmethod
    def forward(ctx: Any, student_states: Tensor, student_head: Tensor, task: _Task) -> Tensor:
        ctx.save_for_backward(student_states, student_head)
        ctx.task = task
        return task.run(HeadInput(student_states, student_head))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        _, *gradients = ctx.task.run(HeadInput(*ctx.saved_tensors), upstream[0], ctx.needs_input_grad[:2])
        return *gradients, None


def _multiply(gradient: Tensor, factor: Tensor) -> Tensor:
    """Return gradient * factor in the dtype of the gradient, rounded once.

    PyTorch would round the factor, a scalar in float32, to bf16 first, which changes it by up to 0.4 %.
    """
    if gradient.dtype == factor.dtype:
        return gradient * factor
    result = torch.empty_like(gradient)
    for part in slices(len(gradient), HEAD_ROWS):  # not all in float32 at one time
        torch.mul(gradient[part].to(factor.dtype), factor, out=result[part])
    return result


def _check_rows(student_head: Tensor, teacher_head: Tensor, name: str) -> None:
    if len(teacher_head) > len(student_head):
        raise ValueError(
            f"{name}: the teacher's head has {len(teacher_head)} rows, the student's {len(student_head)}; "
            "remove from the teacher's head the padding and the token ids that the student does not have"
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
