"""Attention on a GPU: the kernel for each sequence, and padding for cuDNN."""

import pytest
import torch

from megatron_oprd.models.attention import causal_attention
from megatron_oprd.models.flash import CUDNN_FROM, CUDNN_STEP, cudnn_attention, divide_by_kernel

CPU = torch.device("cpu")


def calls(bounds, *, cudnn=True):
    """Return (first token, end, bounds for flash attention) of each call."""
    parts = divide_by_kernel(bounds, CPU, cudnn=cudnn)
    return [(part.start, part.end, part.bounds.tolist() if part.bounds is not None else None) for part in parts]


def test_neighbouring_short_sequences_share_a_call_and_long_ones_have_one_each():
    long = CUDNN_FROM
    bounds = (0, 3, 10, 10 + long, 10 + 2 * long, 17 + 2 * long)
    assert calls(bounds) == [
        (0, 10, [0, 3, 10]),
        (10, 10 + long, None),
        (10 + long, 10 + 2 * long, None),
        (10 + 2 * long, 17 + 2 * long, [0, 7]),
    ]


def test_without_cudnn_all_sequences_share_a_call():
    assert calls((0, 3, 3 + CUDNN_FROM), cudnn=False) == [(0, 3 + CUDNN_FROM, [0, 3, 3 + CUDNN_FROM])]


def test_the_longest_sequence_of_a_call_is_that_of_the_call():
    parts = divide_by_kernel((0, 5, 7, 7 + CUDNN_FROM, 10 + CUDNN_FROM), CPU, cudnn=True)
    assert [part.longest for part in parts] == [5, CUDNN_FROM, 3]


@pytest.mark.parametrize("tokens", [CUDNN_STEP, CUDNN_STEP + 1])
def test_padding_for_cudnn_changes_nothing(tokens):
    draw = torch.Generator().manual_seed(tokens)
    query, key, value = (
        torch.randn(tokens, heads, 8, generator=draw, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    found = cudnn_attention(query, key, value, 0.3)
    batched = (states.transpose(0, 1)[None] for states in (query, key, value))
    expected = causal_attention(*batched, scale=0.3, window=0)[0].transpose(0, 1)
    assert found.shape == (tokens, 4, 8)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    of_found, of_expected = (torch.autograd.grad(one, (query, key, value), upstream) for one in (found, expected))
    for one, other in zip(of_found, of_expected, strict=True):
        torch.testing.assert_close(one, other)
