"""Flash attention of packed sequences, by torch's kernels for CUDA devices. No communication."""

from __future__ import annotations

import torch

FLASH_DTYPES = (torch.bfloat16, torch.float16)


def flash_attention_works(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return True if torch's flash attention kernels support sequences of different lengths on this device."""
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in FLASH_DTYPES
        and head_dim % 8 == 0
        and head_dim <= 256
    )


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
