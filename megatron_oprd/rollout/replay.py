"""Replay stored rollouts from a JSONL file, in order. Needs no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_oprd.data.json_lines import parse_object, read_lines
from megatron_oprd.data.sharding import split
from megatron_oprd.rollout.engine import ImmediateEngine
from megatron_oprd.types import Prompt, Rollout, UserError

_MASKS = ("loss_mask", "mask", "action_mask", "responses_mask")  # other programs' names of response_mask


def load_replay(
    path: str | Path, vocab_size: int | None = None, *, teacher_vocab_size: int | None = None
) -> list[Rollout]:
    """Read all rollouts of a JSONL file. Empty lines are skipped. No communication.

    Each line is an object with these keys:
        prompt_ids, response_ids: lists of token ids.
        response_mask (optional): 1 for each response token that the student sampled, else 0. Default: all 1.
        teacher_prompt_ids (optional): the prompt for the teacher, if different from `prompt_ids`.
        data_source (optional): a string.

    Args:
        vocab_size: limit of the token ids; None for no check.
        teacher_vocab_size: limit of `teacher_prompt_ids` for a teacher with another tokenizer. Every line must then
            have `teacher_prompt_ids`.

    Returns:
        The rollouts; `prompt_index` is the line number, from 0.

    Raises:
        UserError: the file cannot be read, or a line is invalid. Names the file and the line.
    """
    try:
        lines = read_lines(Path(path))
    except OSError as error:
        raise UserError(f"rollout.path: cannot read {path}: {error.strerror}; name a JSONL file of rollouts") from None
    rollouts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rollouts.append(parse_rollout(line, number - 1, vocab_size, teacher_vocab_size))
            except _BadLineError as error:
                raise UserError(f"{path}, line {number}: {error}; correct the line or leave it out") from None
    if not rollouts:
        raise UserError(f"{path} holds no rollouts; name a JSONL file with one a line")
    return rollouts


def rollouts_of_step(rollouts: Sequence[Rollout], step: int, per_step: int) -> list[Rollout]:
    """Return the `per_step` rollouts of a training step, counted from 0. Raises UserError if there are too few."""
    check_enough(rollouts, step + 1, per_step)
    return list(rollouts[step * per_step : (step + 1) * per_step])


def check_enough(rollouts: Sequence[Rollout], steps: int, per_step: int) -> None:
    """Raise UserError with the number of missing lines if `steps` steps need more rollouts."""
    missing, possible = steps * per_step - len(rollouts), len(rollouts) // per_step
    if missing > 0:
        fewer = f"set train.steps={possible}" if possible else "lower rollout.prompts_per_step"
        raise UserError(
            f"rollout.path has {len(rollouts)} rollouts, but {steps} steps of {per_step} (rollout.prompts_per_step x "
            f"rollout.samples_per_prompt) need {steps * per_step}: {missing} lines are missing; add them or {fewer}"
        )


class ReplayEngine(ImmediateEngine):
    """Returns stored rollouts step by step. No communication.

    Each of the `num_replicas` replicas gets a contiguous part of a step. The sizes of the parts differ by at most one.
    """

    def __init__(
        self, rollouts: Sequence[Rollout], per_step: int, *, replica_rank: int = 0, num_replicas: int = 1
    ) -> None:
        self.rollouts = rollouts
        self.per_step = per_step
        self.replica_rank = replica_rank
        self.num_replicas = num_replicas

    def generate(self, prompts: Sequence[Prompt], step: int, limits: Sequence[int] | None = None) -> list[Rollout]:
        """Return this replica's rollouts of a step, counted from 0.

        `prompts` and `limits` are ignored: the file has the prompts and the responses.
        """
        return split(rollouts_of_step(self.rollouts, step, self.per_step), self.replica_rank, self.num_replicas)


class _BadLineError(Exception):
    pass


def replay_record(rollout: Rollout) -> dict[str, object]:
    """Return the JSON object of a rollout for a replay file."""
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
    """Return the rollout of line number `index`; the arguments are those of `load_replay`."""
    try:
        record = parse_object(line)
    except ValueError as error:
        raise _BadLineError(str(error)) from None
    if "response_mask" not in record and (other := next((name for name in _MASKS if name in record), None)):
        raise _BadLineError(f"{other} is not read; name it response_mask")
    response_ids = _ids(record, "response_ids", vocab_size)
    teacher_prompt_ids = None
    if record.get("teacher_prompt_ids") is not None:
        teacher_prompt_ids = _prompt_ids(record, "teacher_prompt_ids", teacher_vocab_size or vocab_size)
    elif teacher_vocab_size is not None:
        raise _BadLineError(
            "teacher_prompt_ids is missing: the teacher has another tokenizer and needs the prompt in its own token ids"
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
