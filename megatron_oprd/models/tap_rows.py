"""Functions of taps on rows of a layer's output: copy some rows, and add a gradient to these rows."""

from __future__ import annotations

import torch


def selected_rows(hidden_states: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    """Return a copy [N, hidden] of the selected rows of hidden_states.flatten(0, 1)."""
    return hidden_states.flatten(0, 1).index_select(0, selected)


def add_rows(gradient: torch.Tensor, selected: torch.Tensor, summands: torch.Tensor) -> torch.Tensor:
    """Return gradient [sequence, batch, hidden] plus summands [N, hidden] at the selected rows.

    The result is a new tensor: another branch of the graph may still use the incoming gradient.
    """
    total = gradient.clone(memory_format=torch.contiguous_format)
    total.view(-1, gradient.shape[-1]).index_add_(0, selected, summands)
    return total


def same_values(hidden_states: torch.Tensor) -> torch.Tensor:
    """Return another tensor with the same memory. An autograd function that returns its input makes a view of it, and
    pipeline schedules refuse to free views."""
    output = torch.empty(0, dtype=hidden_states.dtype, device=hidden_states.device)
    output.data = hidden_states.data
    return output
