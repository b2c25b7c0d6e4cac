"""The rollouts that are pending when a checkpoint is saved (`rollout.ahead: 1`), so that a resumed run is exact.

A resumed run could not make them again: the weights that sampled them are older than those of the checkpoint.
`saver.py` writes the file and `training_state.py` reads it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_oprd.data.prompts import PromptState
from megatron_oprd.data.sharding import split
from megatron_oprd.parallel.topology import Topology
from megatron_oprd.rollout.engine import FinishedRollouts
from megatron_oprd.rollout.stored import rollouts_as_text, rollouts_from_text
from megatron_oprd.runtime.files import write_text
from megatron_oprd.training.state import PendingStep
from megatron_oprd.types import Rollout, UserError

FILE = "pending_rollouts.jsonl"


@dataclass(frozen=True)
class PromptsEntry:
    """A PromptState in state.json, where epoch and position may not be missing."""

    epoch: int
    position: int
    of_source: dict[str, int] = field(default_factory=dict)  # only with data.group_by_teacher

    def state(self) -> PromptState:
        """Return the position in the prompts."""
        return PromptState.from_dict(asdict(self))


@dataclass(frozen=True)
class PendingEntry:
    """The entry of pending rollouts in state.json."""

    version: int  # updates that the sampling weights have seen
    prompts: PromptsEntry  # prompts taken so far, those of the pending rollouts included
    sha256: str  # of the file with the rollouts

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as plain values, as state.json has it."""
        return {**asdict(self), "prompts": self.prompts.state().to_dict()}


def write_pending(folder: Path, pending: PendingStep, rollouts: Sequence[Rollout]) -> PendingEntry:
    """Write the rollouts of all replicas to `folder` and return their entry in state.json.

    One rank calls this. Raises UserError for a disk error.
    """
    text = rollouts_as_text(rollouts)
    write_text(folder / FILE, text)
    prompts = PromptsEntry(**pending.prompts.to_dict())
    return PendingEntry(pending.version, prompts, _digest(text.encode()))


def read_pending(folder: Path, entry: PendingEntry, topology: Topology) -> PendingStep:
    """Return this replica's part of the pending rollouts in `folder`, in any layout.

    No communication. Raises UserError for a missing or changed file.
    """
    try:
        content = (folder / FILE).read_bytes()
    except OSError as error:
        raise UserError(f"{folder / FILE}: {error.strerror}") from None
    if _digest(content) != entry.sha256:
        raise UserError(f"{folder / FILE} is truncated or corrupt: its hash is not that in state.json")
    rollouts = rollouts_from_text(content.decode())
    local_rollouts = split(rollouts, topology.replica_rank, topology.num_replicas)
    return PendingStep(entry.version, entry.prompts.state(), FinishedRollouts(local_rollouts))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
