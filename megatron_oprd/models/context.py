"""What the layers must know of the micro-batch that runs through them.

It travels in a `ContextVar`, not in a global: under pipelining and recomputation "the current micro-batch" changes
between the forward of a layer and its backward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch


class Tap(Protocol):
    """Receives the hidden state of a layer, [tokens, 1, hidden], and returns what flows on in its place."""

    def __call__(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True)
class MicroBatchContext:
    """Packing of the micro-batch in flight and who listens to its layers."""

    position_ids: torch.Tensor  # [tokens] int64
    cu_seqlens: tuple[int, ...]  # bounds of the packed sequences, from 0 to tokens
    tap: Tap | None = None
    last_layer: int | None = None  # blocks above it (1-based) are skipped; None: all run
    normed_layer: int | None = None  # the layer that is tapped after the final norm (L), None: before it
    logits: bool = False  # whether the last stage applies the LM head


_current: ContextVar[MicroBatchContext] = ContextVar("micro_batch")


def current() -> MicroBatchContext:
    """The context of the micro-batch that is running; raises LookupError outside `use`."""
    return _current.get()


@contextlib.contextmanager
def use(context: MicroBatchContext) -> Iterator[None]:
    """Run the block as part of a micro-batch."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)
