"""Both functions of losses/reverse_kl.py have the values and gradients of plain autograd over the whole vocabulary."""

import functools
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint

from megatron_oprd.losses import lm_head
from megatron_oprd.losses.lm_head import HeadInput
from megatron_oprd.losses.reverse_kl import reverse_kl_from_hidden, weighted_reverse_kl
from megatron_oprd.testing.distributed import run_distributed

TOKENS, STUDENT_WIDTH, TEACHER_WIDTH = 11, 16, 24
REAL_ROWS, PADDED_ROWS = 37, 40  # of the vocabulary; two ranks hold 20 padded rows each


@functools.cache
def tensors(dtype=torch.float64):
    """Return student and teacher states, both heads, and the weight of each token."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states = draw(TOKENS, STUDENT_WIDTH), draw(TOKENS, TEACHER_WIDTH)
    heads = draw(PADDED_ROWS, STUDENT_WIDTH), draw(REAL_ROWS, TEACHER_WIDTH)
    return tuple(tensor.to(dtype) for tensor in (*states, *heads, draw(TOKENS)))


def by_autograd():
    """Return values, gradient of the states and gradient of the head, from logits of the whole vocabulary."""
    student, teacher, student_head, teacher_head, weights = tensors()
    student, student_head = student.clone().requires_grad_(), student_head.clone().requires_grad_()
    log_p = (student @ student_head[:REAL_ROWS].t()).log_softmax(-1)
    log_q = (teacher @ teacher_head.t()).log_softmax(-1)
    values = (log_p.exp() * (log_p - log_q)).sum(-1)
    return values.detach(), *torch.autograd.grad((weights * values).sum(), (student, student_head))


def check(rank, ranks, chunk_tokens, dtype, tolerance):
    student, teacher, student_head, teacher_head, weights = tensors(dtype)
    rows = slice(rank * PADDED_ROWS // ranks, (rank + 1) * PADDED_ROWS // ranks)
    student, own_head = student.clone().requires_grad_(), student_head[rows].clone().requires_grad_()
    group = dist.group.WORLD if ranks > 1 else None
    expected_values, for_states, for_head = by_autograd()
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, check_dtype=False)

    def compare(values, loss, factor):
        (factor * loss).backward()
        assert values.dtype == dtype and own_head.grad.dtype == dtype
        close(values.detach(), expected_values)
        close(student.grad, factor * for_states)
        close(own_head.grad, factor * for_head[rows])
        student.grad = own_head.grad = None

    values = reverse_kl_from_hidden(student, teacher, own_head, teacher_head[rows], group, chunk_tokens)
    compare(values, (weights * values).sum(), 1.0)
    inputs = HeadInput(student, own_head), HeadInput(teacher, teacher_head[rows])
    loss, values = weighted_reverse_kl(*inputs, weights, group, chunk_tokens)
    close(loss.detach(), (weights * expected_values).sum())
    compare(values, loss, 3.0)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_process_equals_autograd(chunk_tokens, dtype, tolerance):
    check(0, 1, chunk_tokens, dtype, tolerance)


def check_in_slices(rank, ranks, chunk_tokens):
    with mock.patch.object(lm_head, "SLICE_BYTES", 3 * 4 * PADDED_ROWS // ranks):  # three tokens
        check(rank, ranks, chunk_tokens, torch.float64, 1e-12)


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_divided_vocabulary_equals_autograd_on_the_whole(ranks):
    run_distributed(ranks, check_in_slices, ranks, 4)


def test_a_head_without_gradient_gets_none_and_the_states_keep_theirs():
    student, teacher, student_head, teacher_head, weights = tensors()
    student = student.clone().requires_grad_()
    values = reverse_kl_from_hidden(student, teacher, student_head, teacher_head)
    (weights * values).sum().backward()
    torch.testing.assert_close(student.grad, by_autograd()[1])
    student.grad = None
    weighted_reverse_kl(HeadInput(student, student_head), HeadInput(teacher, teacher_head), weights)[0].backward()
    torch.testing.assert_close(student.grad, by_autograd()[1])
    assert student_head.grad is None


def test_recomputation_repeats_the_loss_with_its_gradients():
    student, teacher, student_head, teacher_head, weights = tensors()
    student, student_head = student.clone().requires_grad_(), student_head.clone().requires_grad_()

    def loss(states):
        return weighted_reverse_kl(HeadInput(states, student_head), HeadInput(teacher, teacher_head), weights)[0]

    for reentrant in (True, False):
        torch.utils.checkpoint.checkpoint(loss, student, use_reentrant=reentrant).backward()
        torch.testing.assert_close(student.grad, by_autograd()[1])
        torch.testing.assert_close(student_head.grad, by_autograd()[2])
        student.grad = student_head.grad = None


def test_no_tokens_give_no_values_and_zero_gradients():
    _, _, student_head, teacher_head, _ = tensors()
    head = student_head.clone().requires_grad_()
    values = reverse_kl_from_hidden(torch.zeros(0, STUDENT_WIDTH).double(), torch.zeros(0, 24), head, teacher_head)
    values.sum().backward()
    assert values.shape == (0,) and not head.grad.any()


def test_a_teacher_head_with_more_rows_than_the_students_is_refused():
    student, teacher, student_head, teacher_head, _ = tensors()
    with pytest.raises(ValueError, match=r"the teacher.s head has 37 rows, the student.s 30"):
        reverse_kl_from_hidden(student, teacher, student_head[:30], teacher_head)
