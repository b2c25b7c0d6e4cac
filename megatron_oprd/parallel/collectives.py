"""Collectives over small host values. The caller always names the process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def sum_over(values: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Return the element-wise sum over the group, in float64, on every rank."""
    return _reduce(values, group, device, dist.ReduceOp.SUM)


def max_over(values: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Return the element-wise maximum over the group, in float64, on every rank."""
    return _reduce(values, group, device, dist.ReduceOp.MAX)


def min_over(values: Sequence[float], group: dist.ProcessGroup, device: torch.device) -> list[float]:
    """Return the element-wise minimum over the group, in float64, on every rank."""
    return _reduce(values, group, device, dist.ReduceOp.MIN)


def gather_objects(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Return the picklable values of all ranks of the group, in rank order, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def _reduce(values: Sequence[float], group: dist.ProcessGroup, device: torch.device, operation: Any) -> list[float]:
    tensor = torch.tensor(list(values), dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation, group=group)
    return tensor.tolist()
