"""`megatron_oprd.train` for torchrun, with one rank that comes to harm in step 2: in the first attempt rank 1 falls
asleep while the student learns, in the second rank 3 raises while it generates. A third goes well."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.utils.tensorboard  # noqa: F401  # here: imported late, it takes long where all wait

from megatron_oprd import train
from megatron_oprd.rollout.embedded import EmbeddedEngine
from megatron_oprd.runtime import progress
from megatron_oprd.runtime.cli import run_command


def fall_asleep() -> None:
    time.sleep(10_000)


def fail() -> None:
    raise ValueError("no more of this")


def in_step_two(harm: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which comes to harm when it is called in training step 2."""

    @functools.wraps(function)
    def harmed(*args: Any, **kwargs: Any) -> Any:
        if progress.here().step == 2:
            harm()
        return function(*args, **kwargs)

    return harmed


def wait_for_all(folder: Path) -> None:
    """Go on when all ranks of this attempt have imported what they need: their time-outs are short."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    (folder / f"{attempt}-{os.environ['RANK']}.here").touch()
    while len(list(folder.glob(f"{attempt}-*.here"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.05)


if __name__ == "__main__":
    wait_for_all(Path(os.environ["WOUNDED"]))
    match os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]:
        case "0", "1":
            train.student_step = in_step_two(fall_asleep, train.student_step)
        case "1", "3":
            EmbeddedEngine.generate = in_step_two(fail, EmbeddedEngine.generate)  # type: ignore[method-assign]
    run_command(train.main)
