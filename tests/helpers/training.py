"""Run an update of a tiny student by the package, also with AdamW and with gradient buckets that tiny models fill."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

from megatron_oprd.launch.assemble import Run
from megatron_oprd.testing.replayed_run import LEARNING_RATE, Teachers, build_replayed_run
from megatron_oprd.testing.update import Update, measure_update
from megatron_oprd.train import one_step
from megatron_oprd.training import overlap
from megatron_oprd.types import Rollout

BUCKET_PARAMETERS = 4_000  # most matrices of the tiny models have a bucket each
# AdamW without memory or decay, with an epsilon far above any gradient: its step is the gradient times LEARNING_RATE.
ADAM_EPSILON = 2.0**27
ADAMW = (
    "optimizer.name=adamw",
    "optimizer.betas=[0.0,0.0]",
    "optimizer.weight_decay=0",
    f"optimizer.lr={LEARNING_RATE * ADAM_EPSILON}",
    f"optimizer.eps={ADAM_EPSILON}",
)


def megatron_update(
    rank: int, student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None
) -> Update:
    """Build a run, take its first step and return the update, with all gradients on rank 0."""
    return measure_update(make_run(student, teacher, *overrides, rollouts=rollouts), one_step)


def make_run(student: Path, teacher: Teachers, *overrides: str, rollouts: Sequence[Rollout] | None = None) -> Run:
    """Build a run before its first step. Collective over the world."""
    return build_replayed_run(student, teacher, *overrides, rollouts=rollouts)


@contextlib.contextmanager
def small_buckets() -> Iterator[None]:
    """Make Megatron's DDP divide gradients into buckets of BUCKET_PARAMETERS."""
    original = overlap.DistributedDataParallelConfig
    patched = functools.partial(original, bucket_size=BUCKET_PARAMETERS)
    with mock.patch.object(overlap, "DistributedDataParallelConfig", patched):
        yield
