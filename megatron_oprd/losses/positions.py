"""Which response tokens the loss reads."""

from __future__ import annotations

from collections.abc import Sequence


def select_positions(response_mask: Sequence[int], mode: str, k: int) -> list[int]:
    """Indices into the response, ascending, of the tokens that are compared.

    `response_mask` is 1 where the student sampled the token; "last k" means the last k of those, so that tool output in
    between neither counts nor is compared. Modes: all, last, last_k, first_k. An empty response selects nothing.
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
