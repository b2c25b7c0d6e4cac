"""Which rank holds up a run, from what all ranks last said of themselves. No communication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_oprd.resilience.heartbeat import Heartbeat


@dataclass(frozen=True)
class Sign:
    """A rank as another one sees it: its last heartbeat, if it left any, and for how long that has not changed, by the
    clock of the one who looks (those of two machines may differ)."""

    rank: int
    last: Heartbeat | None
    silent_seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The rank that holds up all others (None: they hold up each other), and the line that says so."""

    rank: int | None
    line: str


def judge(signs: Sequence[Sign], timeout_seconds: float, silent_after_seconds: float) -> Verdict | None:
    """Who is to blame when the one who asks got no further for `timeout_seconds`; None: all is well, others are slow.

    `signs` are those of all ranks that have not ended, the asking one's too. A rank without a new heartbeat for
    `silent_after_seconds` has stopped or is gone. Of the others those that wait for other ranks are not to blame; of
    those that do not, the one that got no further for longest is, unless it still gets on.
    """
    silent = [sign for sign in signs if sign.silent_seconds >= silent_after_seconds]
    if silent:
        return Verdict(silent[0].rank, _silence(silent))
    beats = [sign.last for sign in signs if sign.last is not None]
    if len(beats) < len(signs):
        return None  # one has just ended, and will have left its reason, or has not begun to speak
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


def _silence(silent: Sequence[Sign]) -> str:
    first, others = silent[0], len(silent) - 1
    who = f"rank {first.rank}" + (f" on {first.last.host}" if first.last else "")
    seen = f"last seen in {first.last.place} at {first.last.where}" if first.last else "never seen"
    more = f" (and {others} more: {', '.join(str(sign.rank) for sign in silent[1:9])})" if others else ""
    return (
        f"{who}{more} gives no sign of life for {first.silent_seconds:.0f} s, {seen}: its process is stopped or its "
        "machine is gone"
    )


def _deadlock(beats: Sequence[Heartbeat]) -> str:
    shown = "; ".join(f"rank {beat.rank} on {beat.host} in {beat.place} at {beat.where}" for beat in beats[:4])
    rest = f"; and {len(beats) - 4} more" if len(beats) > 4 else ""
    longest = max(beat.seconds_without_progress for beat in beats)
    return f"all ranks wait for each other, for {longest:.0f} s: {shown}{rest}"
