"""Selection of the response tokens that the loss compares."""

from __future__ import annotations

from collections.abc import Sequence


def select_positions(response_mask: Sequence[int], mode: str, k: int) -> list[int]:
    """Return the indices of the selected response tokens, in ascending order.

    Only tokens that the student sampled can be selected: tool output neither is compared nor counts for k.

    Args:
        response_mask: 1 for each response token that the student sampled, else 0.
        mode: all, last, last_k or first_k.
        k: the number of tokens for last_k and first_k.

    Raises:
        ValueError: another mode.
    """
    sampled = [index for index, flag in enumerate(response_mask) if flag]
    if mode == "all":
        return sampled
    if mode == "last":
        return sampled[-1:]
    if mode == "last_k":
        return sampled[-k:]
    if mode == "first_k":
        return sampled[:k]
    raise ValueError(f"unknown position mode {mode!r}")
