"""Logits from hidden states, chunk by chunk, so that no tensor of all tokens x vocabulary exists."""

from __future__ import annotations

import torch

CHUNK_BYTES = 2**27  # of one [tokens, vocabulary] buffer in float32; three or four exist at a time


def default_chunk_tokens(head_rows: int) -> int:
    """Return the number of tokens whose logits over `head_rows` columns fill CHUNK_BYTES, at least 1."""
    return max(CHUNK_BYTES // (4 * head_rows), 1)


def logits_of(states: torch.Tensor, head: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Return the logits of states [n, hidden] over the rows of head [rows, hidden], divided by the temperature.

    The result [n, rows] is float32 (float64 for float64 states) and shares no memory: the caller may overwrite it.
    No communication.
    """
    logits = states @ head.t()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.div_(temperature) if temperature != 1 else wide
