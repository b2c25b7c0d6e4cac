"""Products with LM heads, chunk by chunk of tokens, so that no tensor of all tokens x vocabulary exists.

A chunk is processed once: logits of both models, objective and its gradient for the student's logits, products of that
gradient with head and states. Forward therefore has all gradients, and nothing is computed again in backward.

Tokens are cut twice. A *chunk* has enough tokens for efficient products. Its logits have the dtype of the states, and
the gradient replaces the student's. Inside of it, the objective is computed on *slices* in float32, of which several
temporary buffers exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SLICE_BYTES = 2**27  # of one float32 buffer [tokens of a slice, rows]; three or four exist at a time
CHUNK_BYTES = 2**30  # of the logits of both models for a chunk
CHUNK_TOKENS = 2048  # more tokens in a chunk save less than 1 % of an update
HEAD_ROWS = 16384  # rows of a head's gradient that are converted to the dtype of the gradient buffer at one time


@dataclass(frozen=True)
class HeadInput:
    """The final hidden states of a model, and the rows of its LM head on this rank."""

    states: Tensor  # [N, d], after the final norm
    head: Tensor  # [rows, d]
    base: HeadInput | None = None  # the model from which the logits are extrapolated; None: they are the model's own
    extrapolate: float = 1.0  # lambda: logits are base + lambda (model - base)


# Computes the objective of a slice from the logits [n, rows] of student and teacher, both of which it may overwrite.
# Returns the gradient for the student's logits, in the memory of the student's logits.
Objective = Callable[[Tensor, Tensor, slice], Tensor]


def slice_tokens(head_rows: int) -> int:
    """Return the number of tokens whose logits over `head_rows` columns fill SLICE_BYTES in float32, at least 1."""
    return max(SLICE_BYTES // (4 * head_rows), 1)


def auto_chunk_tokens(head_rows: int, dtype: torch.dtype) -> int:
    """Return the number of tokens in a chunk: CHUNK_TOKENS, fewer if their logits exceed CHUNK_BYTES, at least a slice.

    For each chunk, the products read both heads and add to the gradient of one, about 14 bytes for each element of a
    head. They compute 8 operations for each element and token. On a GPU with 200 operations per byte, reading and
    writing therefore adds 350 / tokens to their time. The number depends on the head's shape and dtype alone, so that
    all ranks, a memory plan and a resumed run have the same.
    """
    return max(slice_tokens(head_rows), min(CHUNK_TOKENS, CHUNK_BYTES // (2 * dtype.itemsize * head_rows)))


def slices(tokens: int, size: int) -> Iterator[slice]:
    """Yield the slices of at most `size` tokens that divide `tokens`."""
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


def logits_gradient(student: HeadInput, teacher: HeadInput, objective: Objective, size: int | None) -> Tensor:
    """Return the gradient for the student's logits of one chunk, [n, rows] in the dtype of the states.

    Args:
        student, teacher: states of the same n tokens, heads with rows for the same token ids.
        objective: the objective of each slice.
        size: tokens of a slice; None: the objective gets all logits at once, in the dtype of the states.

    One product with each head. No communication but that of `objective`.
    """
    tokens = len(student.states)
    if size is None:
        return objective(logits_of(student), logits_of(teacher), slice(0, tokens))
    if tokens <= size:  # logits in the dtype of the states are freed as soon as the wider ones exist
        return objective(_wide(logits_of(student)), _wide(logits_of(teacher)), slice(0, tokens)).to(
            student.states.dtype
        )
    logits, teacher_logits = logits_of(student), logits_of(teacher)
    for part in slices(tokens, size):
        gradient = objective(_wide(logits[part]), _wide(teacher_logits[part]), part)
        if gradient.dtype != logits.dtype:  # otherwise the gradient is there already
            logits[part] = gradient
    return logits


def add_head_gradient_(target: Tensor, for_logits: Tensor, states: Tensor) -> None:
    """Add for_logits^T states to the first rows of `target` [at least rows, d], which may have a wider dtype.

    `for_logits` [n, rows] is the gradient of the logits of `states` [n, d].
    """
    rows = for_logits.shape[1]
    if target.dtype == for_logits.dtype:
        target[:rows].addmm_(for_logits.t(), states)
        return
    for start in range(0, rows, HEAD_ROWS):
        block = for_logits[:, start : start + HEAD_ROWS]
        target[start : start + block.shape[1]].add_(block.t() @ states)


def logits_of(model: HeadInput) -> Tensor:
    """Return logits [n, rows]; in the form z + (lambda - 1) (z - z_base), which is exactly z for equal models."""
    logits = model.states @ model.head.t()
    if model.base is None:
        return logits
    of_base = logits_of(model.base)
    return logits.add_(torch.sub(logits, of_base, out=of_base), alpha=model.extrapolate - 1)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
