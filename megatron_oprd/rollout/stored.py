"""Write rollouts to a JSONL file and read them back without loss. No communication.

The lines are those of a replay file (`replay.py`) with more keys, so that the file can be replayed too.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from megatron_oprd.rollout.replay import parse_rollout, replay_record
from megatron_oprd.types import Rollout

# Fields of a rollout that a replay file has not. A teacher's alignment is computed again from the token ids.
_FIELDS = ("finish_reason", "prompt_index", "sample_index", "logprobs")


def rollouts_as_text(rollouts: Sequence[Rollout]) -> str:
    """Return the JSON lines of rollouts whose teachers' tokens are not aligned yet."""
    records = ({**replay_record(rollout), **{name: getattr(rollout, name) for name in _FIELDS}} for rollout in rollouts)
    return "".join(json.dumps(record) + "\n" for record in records)


def rollouts_from_text(text: str) -> list[Rollout]:
    """Return the rollouts that `rollouts_as_text` wrote. Raises KeyError or ValueError for other text."""
    return [_rollout(line) for line in text.splitlines()]


def _rollout(line: str) -> Rollout:
    record = json.loads(line)
    fields = {name: record[name] for name in _FIELDS}
    if fields["logprobs"] is not None:
        fields["logprobs"] = tuple(fields["logprobs"])
    return dataclasses.replace(parse_rollout(line.encode(), 0), **fields)
