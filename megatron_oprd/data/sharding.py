"""Which part of a step's items a data-parallel rank works on. Pure, no communication."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def split(items: Sequence[Item], rank: int, size: int) -> list[Item]:
    """The contiguous part of `items` for `rank` of `size`: lengths differ by at most one, and a part may be empty.

    The parts of ranks 0..size-1, one after the other, are `items`. Raises ValueError for a rank outside 0..size-1.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not in 0..{size - 1}")
    return list(items[len(items) * rank // size : len(items) * (rank + 1) // size])
