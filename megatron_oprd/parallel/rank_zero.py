"""Run a function on rank 0 or on every rank, and raise its failure on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_oprd.types import UserError

Result = TypeVar("Result")


class RankZeroFailed(RuntimeError):
    """The function of `on_rank_zero` failed on rank 0. The other ranks raise this."""


def on_rank_zero(function: Callable[[], Result]) -> Result:
    """Call `function` on rank 0 and return its picklable result on every rank. Collective over the world.

    If the function fails, every rank raises, so that no rank waits for rank 0.

    Raises:
        UserError: on every rank, if the function raised it.
        RankZeroFailed: on the other ranks for any other exception, which rank 0 raises itself.
    """
    failure: Exception | None = None
    message: list[tuple[str, object]] = [("", None)]
    if dist.get_rank() == 0:
        try:
            message = [("result", function())]
        except Exception as error:
            failure = error
            is_user = isinstance(error, UserError)
            message = [("user", error.args) if is_user else ("error", str(error) or type(error).__name__)]
    dist.broadcast_object_list(message, src=0)
    kind, value = message[0]
    if failure is not None:
        if isinstance(failure, UserError):
            failure.everywhere = True
        raise failure
    if kind == "user":
        raise _error_of_all_ranks(*value)  # type: ignore[misc]
    if kind == "error":
        raise RankZeroFailed(f"rank 0 failed: {value}")
    return value  # type: ignore[return-value]


def on_every_rank(function: Callable[[], Result]) -> Result:
    """Call `function` on every rank and return the result of this rank. Collective over the world.

    Raises UserError on every rank if the function raised it on one.
    """
    failure: tuple[str, str] | None = None
    try:
        result = function()
    except UserError as error:
        failure = error.args
    failures: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for failed in failures:
        if failed is not None:
            raise _error_of_all_ranks(*failed)
    return result


def _error_of_all_ranks(message: str, advice: str) -> UserError:
    error = UserError(message, advice)
    error.everywhere = True
    return error
