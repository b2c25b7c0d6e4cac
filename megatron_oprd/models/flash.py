"""Attention of packed sequences by torch's kernels for CUDA devices: flash attention, and cuDNN's for long sequences.

No communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

FLASH_DTYPES = (torch.bfloat16, torch.float16)
# cuDNN's attention is faster for long sequences. Each new length costs about 0.1 s once, so lengths are rounded up.
CUDNN_FROM = 4096  # tokens
CUDNN_STEP = 1024  # tokens


@dataclass(frozen=True)
class Sequences:
    """Neighbouring sequences of a micro-batch that one attention call computes."""

    start: int  # first token
    end: int
    bounds: torch.Tensor | None  # [sequences + 1] int32 from 0, for flash attention; None: one sequence for cuDNN
    longest: int  # most tokens of a sequence


def divide_by_kernel(bounds: Sequence[int], device: torch.device, *, cudnn: bool) -> list[Sequences]:
    """Divide a micro-batch into the sequences of each attention call.

    Args:
        bounds: cumulative lengths of the packed sequences, from 0.
        device: of the bounds in the result.
        cudnn: True if long sequences use cuDNN, one by one.
    """
    parts = []
    pairs = [pair for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]
    for is_long, group in itertools.groupby(pairs, lambda pair: cudnn and pair[1] - pair[0] >= CUDNN_FROM):
        sequences = list(group)
        if is_long:
            parts += [Sequences(start, end, None, end - start) for start, end in sequences]
            continue
        first = sequences[0][0]
        offsets = torch.tensor([0, *(end - first for _, end in sequences)], dtype=torch.int32)
        longest = max(end - start for start, end in sequences)
        parts.append(Sequences(first, sequences[-1][1], offsets.to(device), longest))
    return parts


def flash_attention_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if torch's flash attention kernels support sequences of different lengths on this device."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in FLASH_DTYPES
        and head_dim % 8 == 0
        and head_dim <= 256
    )


def cudnn_attention_works(device: torch.device, head_dim: int) -> bool:
    """Return True if cuDNN's attention runs on this device, and is faster than flash attention."""
    return (
        head_dim <= 128
        and torch.cuda.get_device_capability(device) >= (9, 0)
        and torch.backends.cuda.cudnn_sdp_enabled()
    )


def cudnn_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the causal attention of one sequence, [tokens, heads, d].

    The sequence is padded at its end, where no token attends to the padding.

    Args:
        query: [tokens, heads, d].
        key, value: [tokens, groups, d].
        scale: of the scores.
    """
    tokens = len(query)
    padding = -tokens % CUDNN_STEP
    if padding:
        query, key, value = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, padding)) for x in (query, key, value))
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=key.shape[1] != query.shape[1]
        )
    return output[0].transpose(0, 1)[:tokens]


def flash_attention(
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bounds: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    scale: float,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return flash attention of packed sequences, [tokens, heads, d].

    Args:
        inputs: queries [tokens, heads, d], keys and values [stored tokens, groups, d].
        bounds: [sequences + 1] int32, where each sequence starts in the queries, and in the keys.
        longest: most queries and most keys of a sequence.
        lengths: [sequences] int32, the keys that count, from the start of each sequence; None: all, and causally.
    """
    # torch.nn.attention.varlen offers the same since torch 2.10, but not `lengths` in each version.
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        *inputs, *bounds, *longest, 0.0, lengths is None, False, scale=scale, seqused_k=lengths
    )[0]
    return output
