"""Stored rollouts instead of generated ones: a JSONL file, read in order. Needs no tokenizer and no model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.data.sharding import split
from megatron_oprd.types import Prompt, Rollout, UserError


def load_replay(
    path: str | Path, vocab_size: int | None = None, *, teacher_vocab_size: int | None = None
) -> list[Rollout]:
    """All rollouts of a file with one object a line: `prompt_ids`, `response_ids` and, where not all response tokens
    are the student's own, `response_mask` (0 or 1 a response token). Optional too: `teacher_prompt_ids`, which the
    teacher reads in place of `prompt_ids`, and `data_source`, a string. With `teacher_vocab_size` the teacher has a
    vocabulary of its own, that of `teacher_prompt_ids`, which every line then has.

    `prompt_index` is the line number, from 0. Lines that are empty are passed over. No communication. Raises
    UserError, naming the file and the line, for anything else, and for an id that a vocabulary of `vocab_size` lacks.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"rollout.path: cannot read {path}: {error.strerror}") from None
    rollouts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rollouts.append(parse_rollout(line, number - 1, vocab_size, teacher_vocab_size))
            except _BadLineError as error:
                raise UserError(f"{path}, line {number}: {error}") from None
    if not rollouts:
        raise UserError(f"{path} holds no rollouts")
    return rollouts


def rollouts_of_step(rollouts: Sequence[Rollout], step: int, per_step: int) -> list[Rollout]:
    """The `per_step` rollouts that training step `step`, from 0, reads. Raises UserError when they are not there."""
    check_enough(rollouts, step + 1, per_step)
    return list(rollouts[step * per_step : (step + 1) * per_step])


def check_enough(rollouts: Sequence[Rollout], steps: int, per_step: int) -> None:
    """Raise UserError, saying how many lines are missing, when `steps` steps need more rollouts than there are."""
    missing = steps * per_step - len(rollouts)
    if missing > 0:
        raise UserError(
            f"rollout.path has {len(rollouts)} rollouts, but {steps} steps of {per_step} (rollout.prompts_per_step x "
            f"rollout.samples_per_prompt) need {steps * per_step}: {missing} lines are missing"
        )


class ReplayEngine:
    """Serves a replay file step by step. Replica `replica_rank` of `num_replicas` gets the contiguous part of a
    step that is its own; the parts of different ranks differ by one rollout at most. No communication."""

    def __init__(
        self, rollouts: Sequence[Rollout], per_step: int, *, replica_rank: int = 0, num_replicas: int = 1
    ) -> None:
        self.rollouts = rollouts
        self.per_step = per_step
        self.replica_rank = replica_rank
        self.num_replicas = num_replicas

    def generate(self, prompts: Sequence[Prompt], step: int) -> list[Rollout]:
        """This rank's rollouts of step `step`, from 0; the file says what was asked, so `prompts` is not read."""
        return split(rollouts_of_step(self.rollouts, step, self.per_step), self.replica_rank, self.num_replicas)


class _BadLineError(Exception):
    pass


def replay_record(rollout: Rollout) -> dict[str, object]:
    """A rollout as a line of a replay file has it."""
    record: dict[str, object] = {
        "prompt_ids": rollout.prompt_ids,
        "response_ids": rollout.response_ids,
        "response_mask": rollout.response_mask,
        "data_source": rollout.data_source,
    }
    if rollout.teacher_prompt_ids is not None:
        record["teacher_prompt_ids"] = rollout.teacher_prompt_ids
    return record


def parse_rollout(
    line: bytes, index: int, vocab_size: int | None = None, teacher_vocab_size: int | None = None
) -> Rollout:
    """The rollout of one line, number `index`; see `load_replay`."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise _BadLineError("not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise _BadLineError(f"an object with prompt_ids and response_ids is wanted, not a {type(record).__name__}")
    response_ids = _ids(record, "response_ids", vocab_size)
    teacher_prompt_ids = None
    if record.get("teacher_prompt_ids") is not None:
        teacher_prompt_ids = _prompt_ids(record, "teacher_prompt_ids", teacher_vocab_size or vocab_size)
    elif teacher_vocab_size is not None:
        raise _BadLineError(
            "teacher_prompt_ids is missing: the teacher has another tokenizer, and reads the prompt in its own ids"
        )
    return Rollout(
        _prompt_ids(record, "prompt_ids", vocab_size),
        response_ids,
        _mask(record, len(response_ids)),
        "replay",
        prompt_index=index,
        data_source=_data_source(record),
        teacher_prompt_ids=teacher_prompt_ids,
    )


def _prompt_ids(record: dict[str, Any], key: str, vocab_size: int | None) -> tuple[int, ...]:
    ids = _ids(record, key, vocab_size)
    if not ids:
        raise _BadLineError(f"{key} is empty")
    return ids


def _ids(record: dict[str, Any], key: str, vocab_size: int | None) -> tuple[int, ...]:
    if key not in record:
        raise _BadLineError(f"{key} is missing")
    ids = record[key]
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):  # a bool is an int to isinstance
        raise _BadLineError(f"{key} must be a list of integers")
    if ids and min(ids) < 0:
        raise _BadLineError(f"{key} contains the negative id {min(ids)}")
    if ids and vocab_size is not None and max(ids) >= vocab_size:
        raise _BadLineError(f"{key} contains {max(ids)}, but the vocabulary ends at {vocab_size - 1}")
    return tuple(ids)


def _mask(record: dict[str, Any], length: int) -> tuple[int, ...]:
    mask = record.get("response_mask")
    if mask is None:
        return (1,) * length
    if not isinstance(mask, list) or any(type(value) is not int or value not in (0, 1) for value in mask):
        raise _BadLineError("response_mask must be a list of 0 and 1")
    if len(mask) != length:
        raise _BadLineError(f"response_mask has {len(mask)} entries for {length} response_ids")
    return tuple(mask)


def _data_source(record: dict[str, Any]) -> str:
    source = record.get("data_source")
    if source is None:
        return ""
    if not isinstance(source, str):
        raise _BadLineError(f"data_source must be a string, not a {type(source).__name__}")
    return source
