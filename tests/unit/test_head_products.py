"""Chunks of tokens change neither the number of products with the LM heads nor the gradients."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_oprd.config import OutputConfig, ParallelConfig
from megatron_oprd.losses import lm_head, reverse_kl
from megatron_oprd.losses.lm_head import HeadInput, auto_chunk_tokens
from megatron_oprd.losses.reverse_kl import reverse_kl_from_hidden, weighted_reverse_kl
from megatron_oprd.models.output_loss import Heads, OutputLoss
from megatron_oprd.parallel.topology import build_topology, start_process
from megatron_oprd.types import DeviceSelection

TOKENS, ROWS, WIDTHS = 40, 96, (16, 24)  # widths of student and teacher
STUDENT_PRODUCT, TEACHER_PRODUCT = (2 * TOKENS * ROWS * width for width in WIDTHS)
SIZES = (None, 40, 16, 7, 1)


class Products(FlopCounterMode):
    """Counts the operations of matrix products, in-place `addmm_` too."""

    def __init__(self):
        in_place = {torch.ops.aten.addmm_: lambda target, first, second, **_: 2 * first[0] * first[1] * second[1]}
        super().__init__(display=False, custom_mapping=in_place)


@pytest.fixture(scope="module")
def topology():
    device = torch.device("cpu")
    start_process(device)
    return build_topology(ParallelConfig(), device, seed=0)


@pytest.fixture
def few_tokens_in_a_slice(monkeypatch):
    monkeypatch.setattr(lm_head, "SLICE_BYTES", 3 * 4 * ROWS)


def random_states_and_heads(dtype):
    draw = torch.Generator().manual_seed(0)
    return [
        torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype)
        for width in WIDTHS
        for rows in (TOKENS, ROWS)
    ]


def output_loss(topology, chunk_tokens, dtype, *, trained=True):
    """Return the gradients of the states and of the head, the sums, and the operations that one call needed."""
    student, head, teacher, teacher_head = random_states_and_heads(dtype)
    parameter = torch.nn.Parameter(head, requires_grad=trained)
    parameter.main_grad = torch.zeros(ROWS, WIDTHS[0], dtype=torch.promote_types(dtype, torch.float32))
    config = OutputConfig(objective="full_kl", chunk_tokens=chunk_tokens)
    heads = Heads(parameter, (teacher_head,), 0)
    objective = OutputLoss(config, heads, topology, temperature=0.7, with_metrics=False)
    rows = torch.arange(TOKENS)
    selection = DeviceSelection(rows, torch.rand(TOKENS, dtype=torch.float64), rows, (TOKENS,), {0: rows})
    with Products() as products:
        gradient, sums = objective(student, teacher, selection)
    return gradient, parameter.main_grad, sums, products.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES)
def test_each_token_is_multiplied_once_with_each_head(topology, few_tokens_in_a_slice, size, dtype):
    operations = output_loss(topology, size, dtype)[-1]
    assert operations == 3 * STUDENT_PRODUCT + TEACHER_PRODUCT  # logits, gradient of the states, gradient of the head


def test_a_frozen_head_costs_no_product_for_its_gradient(topology):
    _, for_head, _, operations = output_loss(topology, 7, torch.float32, trained=False)
    assert operations == 2 * STUDENT_PRODUCT + TEACHER_PRODUCT and not for_head.any()


@pytest.mark.parametrize("size", SIZES[1:])
def test_chunks_and_slices_do_not_change_the_gradients(topology, few_tokens_in_a_slice, size):
    torch.manual_seed(0)
    expected = output_loss(topology, None, torch.float64)[:3]
    torch.manual_seed(0)
    for one, other in zip(output_loss(topology, size, torch.float64)[:3], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_of_a_chunk_change_no_bit_of_the_gradients(topology, monkeypatch, dtype):
    torch.manual_seed(0)
    expected = output_loss(topology, 40, dtype)[:2]
    monkeypatch.setattr(lm_head, "SLICE_BYTES", 3 * 4 * ROWS)
    torch.manual_seed(0)
    assert all(map(torch.equal, output_loss(topology, 40, dtype)[:2], expected))


def losses_from_hidden(size, *, weighted):
    """Return the operations of forward and of backward."""
    student, head, teacher, teacher_head = random_states_and_heads(torch.float32)
    student.requires_grad_(), head.requires_grad_()
    with Products() as forward:
        if weighted:
            inputs = HeadInput(student, head), HeadInput(teacher, teacher_head)
            loss, _ = weighted_reverse_kl(*inputs, torch.ones(TOKENS), chunk_tokens=size)
        else:
            loss = reverse_kl_from_hidden(student, teacher, head, teacher_head, chunk_tokens=size).sum()
    with Products() as backward:
        if loss.requires_grad:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("size", SIZES)
def test_a_weighted_sum_needs_no_product_in_backward(few_tokens_in_a_slice, size):
    logits = STUDENT_PRODUCT + TEACHER_PRODUCT
    assert losses_from_hidden(size, weighted=True) == (logits + 2 * STUDENT_PRODUCT, 0)
    assert losses_from_hidden(size, weighted=False) == (logits, logits + 2 * STUDENT_PRODUCT)


def test_without_autograd_only_the_logits_are_computed():
    with torch.no_grad():
        assert losses_from_hidden(7, weighted=True) == (STUDENT_PRODUCT + TEACHER_PRODUCT, 0)


def gradients_of_weighted_sum(factor, *, create_graph=False):
    """Return the gradients of `factor` times the sum for bf16 states and head."""
    student, head, teacher, teacher_head = random_states_and_heads(torch.bfloat16)
    student.requires_grad_(), head.requires_grad_()
    total, _ = weighted_reverse_kl(HeadInput(student, head), HeadInput(teacher, teacher_head), torch.ones(TOKENS))
    return torch.autograd.grad(total * factor, (student, head), create_graph=create_graph)


def test_the_factor_of_a_weighted_sum_is_not_rounded_to_bf16(monkeypatch):
    monkeypatch.setattr(reverse_kl, "HEAD_ROWS", 7)
    factor = 0.3334  # 0.334 in bf16
    for scaled, plain in zip(gradients_of_weighted_sum(factor), gradients_of_weighted_sum(1.0), strict=True):
        assert torch.equal(scaled, (plain.float() * factor).bfloat16())


def test_second_derivatives_are_refused():
    factor = torch.ones((), requires_grad=True)  # otherwise PyTorch refuses them already
    states, _ = gradients_of_weighted_sum(factor, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        states.sum().backward()


@pytest.mark.parametrize(
    ("rows", "dtype", "tokens"),
    [
        (151936, torch.bfloat16, 1766),  # the logits of both models fill CHUNK_BYTES
        (151936, torch.float32, 883),
        (151936 // 4, torch.bfloat16, 2048),
        (512, torch.float32, 65536),  # a slice has more than CHUNK_TOKENS
        (2**40, torch.float32, 1),
    ],
)
def test_a_chunk_has_enough_tokens_for_products_and_bounded_logits(rows, dtype, tokens):
    assert auto_chunk_tokens(rows, dtype) == tokens
