"""Work whose failure on one rank all of them see."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_oprd.types import UserError

Result = TypeVar("Result")


class RankZeroFailed(RuntimeError):
    """What the other ranks raise when rank 0 fails at its work for all."""


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """`function()` of rank 0, on every rank: its (picklable) result, or what it raised. Collective over the world.

    A UserError is raised as such everywhere, any other exception as itself on rank 0 and as RankZeroFailed on the
    others: nobody waits for a rank that has failed.
    """
    failure: Exception | None = None
    message: list[tuple[str, object]] = [("", None)]
    if dist.get_rank() == 0:
        try:
            message = [("result", function())]
        except Exception as error:
            failure = error
            message = [("user" if isinstance(error, UserError) else "error", str(error) or type(error).__name__)]
    dist.broadcast_object_list(message, src=0)
    kind, value = message[0]
    if failure is not None:
        if isinstance(failure, UserError):
            failure.everywhere = True
        raise failure
    if kind == "user":
        raise _of_all(str(value))
    if kind == "error":
        raise RankZeroFailed(f"rank 0 failed: {value}")
    return value  # type: ignore[return-value]


def on_every_rank(function: Callable[[], Result]) -> Result:
    """`function()` of this rank; a UserError that any rank raised is raised on all. Collective over the world."""
    failure: str | None = None
    try:
        result = function()
    except UserError as error:
        failure = str(error)
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for message in failures:
        if message is not None:
            raise _of_all(message)
    return result


def _of_all(message: str) -> UserError:
    error = UserError(message)
    error.everywhere = True
    return error
