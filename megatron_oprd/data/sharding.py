"""Divide the items of a step over data-parallel ranks. No communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def split(items: Sequence[Item], rank: int, size: int) -> list[Item]:
    """Return the contiguous part of `items` for one rank.

    The parts of ranks 0 to size - 1, one after the other, are `items`. Their lengths differ by at most one; a part may
    be empty. Raises ValueError for a rank outside 0 to size - 1.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in 0..{size - 1}")
    return list(items[len(items) * rank // size : len(items) * (rank + 1) // size])
