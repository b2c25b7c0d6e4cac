"""Interpret a row of a prompt file. A row of which the model would miss a part is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_oprd.config import DataConfig
from megatron_oprd.data.ground_truth import GroundTruth, read_ground_truth
from megatron_oprd.data.messages import Message, read_prompt
from megatron_oprd.types import UserError

# Usual names, in lower case.
_ANSWER_COLUMNS = (
    *("answer", "final_answer", "expected_answer", "correct_answer", "ground_truth", "gold"),
    *("answers", "target", "label", "solution"),
)
_PROMPT_COLUMNS = ("prompt", "messages", "conversations", "conversation", "problem", "question", "instruction", "input")
# Columns of common data sets that belong to the question.
_QUESTION_COLUMNS = ("system", "system_prompt", "context", "passage", "choices", "options", "tools", "functions")
_MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")


@dataclass(frozen=True)
class Row:
    """A row of a prompt file. A missing column leaves the default."""

    prompt: str | list[Message]  # plain text or a conversation
    data_source: str = ""
    ability: str = ""
    ground_truth: GroundTruth | None = None
    answer_style: Literal["rule", "exact"] = "rule"
    teacher_prompt: str | list[Message] | None = None  # the prompt for the teacher; None: the student's prompt
    answer_column: str = ""  # a column that may contain the right answer and that nothing reads


def column_advice(setting: str, columns: Iterable[str]) -> str:
    """Return which key to set for a column that does not exist, with the most likely column."""
    usual = _ANSWER_COLUMNS if setting == "data.answer_key" else _PROMPT_COLUMNS
    names = {name.lower(): name for name in map(str, columns)}
    return next(
        (f"; did you mean {setting}={names[name]}?" for name in usual if name in names),
        f"; set {setting} to one of them",
    )


def columns_to_read(columns: Iterable[str], required: Iterable[str]) -> list[str]:
    """Return the columns of a file that `read_row` uses or checks, among them the `required` ones."""
    used = {*required, "data_source", "ability", "reward_model", *_MEDIA_COLUMNS, *_QUESTION_COLUMNS, "input"}
    return [name for name in columns if name in used or name.lower() in _ANSWER_COLUMNS]


def read_row(where: str, record: Mapping[str, Any], config: DataConfig, file_name: str) -> Row:
    """Return the row that a record of a prompt file contains.

    Args:
        where: the file and the line or row, for messages.
        record: the values by column.
        config: the section `data`, which names the columns.
        file_name: the data source of a row that names none.

    Raises UserError for a malformed row, and for one of which the model would miss a part.
    """
    reward = record.get("reward_model") or {}
    if not isinstance(reward, Mapping):
        raise UserError(
            f"{where}: reward_model is a {type(reward).__name__}; store an object with the key ground_truth"
        )
    _check_no_media(where, record)
    if config.answer_key is not None:
        column, truth = config.answer_key, _value(where, record, config.answer_key, "data.answer_key")
    else:
        column, truth = "reward_model.ground_truth", _rewarded(where, reward)
    try:
        ground_truth = read_ground_truth(truth)
    except ValueError as error:
        raise UserError(f"{where}: {column} {error}") from None
    unused = next((name for name, value in record.items() if name.lower() in _ANSWER_COLUMNS and value is not None), "")
    prompt = _prompt(where, record, config.prompt_key, "data.prompt_key", config)
    teacher_key = config.teacher_prompt_key
    teacher_prompt = teacher_key and _prompt(where, record, teacher_key, "data.teacher_prompt_key", config)
    _check_question_is_complete(where, record, [prompt, teacher_prompt or ""], config)
    return Row(
        prompt=prompt,
        data_source=_label(where, record, "data_source") or file_name,
        ability=_label(where, record, "ability"),
        ground_truth=ground_truth,
        answer_style="exact" if str(reward.get("style")).lower() == "exact" else "rule",
        teacher_prompt=teacher_prompt,
        answer_column=unused if ground_truth is None else "",
    )


def _rewarded(where: str, reward: Mapping[str, Any]) -> Any:
    """Return the right answer of the column reward_model; None if there is none."""
    other = next((name for name in reward if str(name).lower() in _ANSWER_COLUMNS), "ground_truth")
    if "ground_truth" not in reward and other != "ground_truth" and reward[other] is not None:
        raise UserError(f"{where}: reward_model has no ground_truth; rename {other!r} to ground_truth")
    return reward.get("ground_truth")


def _check_no_media(where: str, record: Mapping[str, Any]) -> None:
    for name in _MEDIA_COLUMNS:
        if record.get(name):
            raise UserError(f"{where}: {name!r} is not empty; only text is supported, so leave the row out")


def _check_question_is_complete(
    where: str, record: Mapping[str, Any], prompts: list[str | list[Message]], config: DataConfig
) -> None:
    """Raise UserError for a row with a part of its question in a column that nothing reads.

    A part that one of the `prompts`, of student and teacher, contains is no mistake.
    """
    if config.prompt_key == "instruction" and record.get("input"):
        raise UserError(f"{where}: 'instruction' comes with 'input', which nothing reads; join both into one column")
    messages = (message for prompt in prompts for message in ([prompt] if isinstance(prompt, str) else prompt))
    text = "\n".join(message if isinstance(message, str) else message["content"] for message in messages)
    for name in _QUESTION_COLUMNS:
        if name in (config.prompt_key, config.teacher_prompt_key, config.answer_key):
            continue
        if any(part not in text for part in _texts(record.get(name))):
            raise UserError(
                f"{where}: the prompt does not contain {name!r}, and nothing reads that column; write it into the "
                "prompt, or leave the column out"
            )


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a value of a column, at any depth."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value).strip()


def _label(where: str, record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if isinstance(value, list | Mapping):
        raise UserError(f"{where}: {key} is a {type(value).__name__}; use text")
    return "" if value is None else str(value)


def _prompt(where: str, record: Mapping[str, Any], key: str, setting: str, config: DataConfig) -> str | list[Message]:
    try:
        return read_prompt(_value(where, record, key, setting), drop_final_answer=config.drop_final_answer)
    except ValueError as error:
        raise UserError(f"{where}: {key!r} {error}") from None


def _value(where: str, record: Mapping[str, Any], key: str, setting: str) -> Any:
    if key not in record:
        known = ", ".join(map(str, record)) or "-"
        raise UserError(f"{where}: no {key!r} ({setting}); it has: {known}{column_advice(setting, record)}")
    return record[key]
