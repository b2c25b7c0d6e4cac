"""The rule that finds the rank which holds up a run, given the last heartbeats of all ranks. No communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.resilience.heartbeat import Heartbeat


@dataclass(frozen=True)
class RankStatus:
    """The state of a rank as observed by another rank."""

    rank: int
    last: Heartbeat | None  # None: the rank has written no heartbeat yet
    silent_seconds: float = 0.0  # since `last` changed, by the observer's clock (clocks of two machines may differ)


@dataclass(frozen=True)
class Verdict:
    """The rank that holds up the run, and the message about it."""

    rank: int | None  # None: the ranks wait for each other
    line: str


def judge(statuses: Sequence[RankStatus], timeout_seconds: float, silent_after_seconds: float) -> Verdict | None:
    """Return the rank that holds up a run in which the observing rank made no progress for `timeout_seconds`.

    1. A rank without a new heartbeat for `silent_after_seconds` is stopped or gone.
    2. Otherwise, among the ranks that do not wait for other ranks, the one longest without progress hangs.
    3. If all ranks wait, they wait for each other.

    Args:
        statuses: all ranks that have not ended, the observing rank included.

    Returns: None if some rank that others may wait for still makes progress, or if a rank has no heartbeat yet.
    """
    silent = [status for status in statuses if status.silent_seconds >= silent_after_seconds]
    if silent:
        return Verdict(silent[0].rank, _silence(silent))
    beats = [status.last for status in statuses if status.last is not None]
    if len(beats) < len(statuses):
        return None  # a rank without a heartbeat has just started, or just ended and left a failure record
    working = [beat for beat in beats if not beat.waits]
    if any(beat.seconds_without_progress < timeout_seconds for beat in working or beats):
        return None
    if not working:
        return Verdict(None, _deadlock(beats))
    slowest = max(working, key=lambda beat: beat.seconds_without_progress)
    return Verdict(
        slowest.rank,
        f"rank {slowest.rank} on {slowest.host} hangs in {slowest.place}: no progress for "
        f"{slowest.seconds_without_progress:.0f} s at {slowest.where}",
    )


def _silence(silent: Sequence[RankStatus]) -> str:
    first, others = silent[0], len(silent) - 1
    who = f"rank {first.rank}" + (f" on {first.last.host}" if first.last else "")
    seen = f"last seen in {first.last.place} at {first.last.where}" if first.last else "never seen"
    more = f" (and {others} more: {', '.join(str(status.rank) for status in silent[1:9])})" if others else ""
    return (
        f"{who}{more} gives no sign of life for {first.silent_seconds:.0f} s, {seen}: its process is stopped or its "
        "machine is gone"
    )


def _deadlock(beats: Sequence[Heartbeat]) -> str:
    shown = "; ".join(f"rank {beat.rank} on {beat.host} in {beat.place} at {beat.where}" for beat in beats[:4])
    rest = f"; and {len(beats) - 4} more" if len(beats) > 4 else ""
    longest = max(beat.seconds_without_progress for beat in beats)
    return f"all ranks wait for each other, for {longest:.0f} s: {shown}{rest}"
