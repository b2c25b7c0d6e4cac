"""Time the sides of `benchmarks/rollout.py` in turn, and measure their memory and their calls."""

from __future__ import annotations

import ctypes
import gc
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.rollout_calls import calls_per_decode_step
from benchmarks.rollout_engines import Generate, Side
from benchmarks.rollout_page import line
from benchmarks.rollout_workloads import Workload
from benchmarks.updates import peak_of
from megatron_oprd.runtime.readable import error_line

SHORT_TOKENS = 16  # the first steps capture graphs


@dataclass
class Measurement:
    """Runs the sides in turn on a workload and returns a row of figures for each.

    A row has lists with a value per repeat: `seconds` for all responses; with equal lengths `prefill_seconds`, for one
    token of each row, and `short_seconds`, for `short_tokens` of each row; `sync_seconds`, for a transfer of the
    weights. `first_seconds` is the run that warms up.
    """

    device: torch.device
    clock: Callable[[], float]
    repeats: int

    def run(self, sides: Sequence[Side], workload: Workload, vocabulary: int) -> list[dict[str, Any]]:
        """Return the row of each side on a workload, and print it."""
        prompts, limits = workload.draw(vocabulary)
        gc.collect()
        runs = {side.name: _SideRun(side, workload, self.empty_row(side, workload, "")) for side in sides}
        for one in runs.values():
            one.attempt(one.prepare)
        for repeat in range(self.repeats + 1):
            for one in runs.values():
                one.attempt(lambda one=one, first=not repeat: self._time(one, prompts, limits, first))
        for one in runs.values():
            one.attempt(lambda one=one: self._peak(one, prompts, limits))
            if workload.equal:
                one.attempt(lambda one=one: self._count_calls(one, prompts))
        reference = next(iter(runs.values())).answers
        for one in runs.values():
            if one.answers and reference and not workload.temperature:
                equal = sum(a == b for a, b in zip(one.answers, reference, strict=True))
                one.row["same_answers"] = equal / len(reference)
            print(line(one.row), flush=True)
        return [one.row for one in runs.values()]

    def empty_row(self, side: Side, workload: Workload, note: str) -> dict[str, Any]:
        """Return a row without figures; `note` says why there are none."""
        row: dict[str, Any] = {"engine": side.name, "workload": workload.name, "rows": workload.rows}
        row |= {"prompts": workload.prompts, "prompt_tokens": workload.prompt_tokens}
        row |= {"new_tokens": workload.new_tokens, "temperature": workload.temperature, "tokens": None}
        row |= {"first_seconds": None, "seconds": [], "prefill_seconds": [], "sync_seconds": []}
        row |= {"short_tokens": min(SHORT_TOKENS, workload.new_tokens[1] // 2), "short_seconds": []}
        return row | {"peak_bytes": None, "server_bytes": None, "same_answers": None, "calls": {}, "note": note}

    def _time(self, one: _SideRun, prompts: Sequence[Any], limits: Sequence[int], first: bool) -> None:
        """Time one run of a side, after a transfer of the weights (which also empties a server's prefix cache)."""
        row = one.row
        sync = self._seconds(one.side.sync) if one.side.sync else 0.0
        of_one_length = {}
        for name, new_tokens in [("prefill_seconds", 1), ("short_seconds", row["short_tokens"])] * one.workload.equal:
            of_one_length[name] = self._seconds(lambda count=new_tokens: one.generate(prompts, [count] * len(limits)))
            if one.side.sync:
                one.side.sync()

        def generate() -> None:
            one.answers = one.generate(prompts, limits)

        seconds = self._seconds(generate)
        row["tokens"] = sum(map(len, one.answers))
        if first:
            row["first_seconds"] = seconds
            return
        row["seconds"].append(seconds)
        row["sync_seconds"].append(sync)
        for name, value in of_one_length.items():
            row[name].append(value)

    def _seconds(self, run: Callable[[], object]) -> float:
        begin = self.clock()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.clock() - begin

    def _peak(self, one: _SideRun, prompts: Sequence[Any], limits: Sequence[int]) -> None:
        if one.side.server_bytes is not None:
            one.row["server_bytes"] = one.side.server_bytes()
        else:
            if self.device.type == "cpu":
                ctypes.CDLL(None).malloc_trim(0)  # memory of earlier runs would hide that of this one
            one.row["peak_bytes"] = peak_of(lambda: one.generate(prompts, limits), self.device)

    def _count_calls(self, one: _SideRun, prompts: Sequence[Any]) -> None:
        if one.side.server_bytes is None:
            one.row["calls"] = calls_per_decode_step(one.generate, prompts, self.device)


@dataclass
class _SideRun:
    """A side at work on a workload. After a failure its row has a note, and nothing of it runs again."""

    side: Side
    workload: Workload
    row: dict[str, Any]
    answers: list[tuple[int, ...]] = field(default_factory=list)
    generate: Generate = field(init=False)

    def prepare(self) -> None:
        """Build what generates."""
        self.generate = self.side.prepare(self.workload)

    def attempt(self, action: Callable[[], None]) -> None:
        """Run an action of this side; note an error in the row."""
        if self.row["note"]:
            return
        try:
            action()
        except torch.OutOfMemoryError:
            self.row["note"] = "out of memory"
        except Exception as error:
            traceback.print_exc()
            self.row["note"] = f"failed: {type(error).__name__}: {error_line(error)}"
