"""Read the rows of prompt files (Parquet, JSONL, hub data sets). Errors name the file and the line or row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oprd.config import DataConfig
from megatron_oprd.data.ground_truth import GroundTruth, read_ground_truth
from megatron_oprd.data.messages import Message, read_prompt
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

_Keys = dict[str, str]  # configuration key -> name of a column that every row must have
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# Usual names, in lower case.
_ANSWER_COLUMNS = (
    *("answer", "final_answer", "expected_answer", "correct_answer", "ground_truth", "gold"),
    *("answers", "target", "label", "solution"),
)
_PROMPT_COLUMNS = ("prompt", "messages", "conversations", "conversation", "problem", "question", "instruction", "input")
_MEDIA_COLUMNS = ("images", "image", "videos", "video", "audios", "audio")
# First bytes of files that are neither Parquet nor JSONL, and what to do.
_OTHER_FILES = (
    (b"\x1f\x8b", "is compressed; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed; unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"version https://git-lfs", "is a pointer of Git LFS; get the file with `git lfs pull`"),
    (b"ARROW1", "is an Arrow file; save it as Parquet"),
    (b"<", "is a page of the web; download the file itself"),
    (b"[\n", "is one JSON array; write one object a line: jq -c '.[]' FILE > FILE.jsonl"),
    (b"[{", "is one JSON array; write one object a line: jq -c '.[]' FILE > FILE.jsonl"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8"),
)
_FILE_SUFFIXES = {".parquet", ".jsonl", ".json", ".ndjson", ".txt", ".csv", ".gz", ".zst"}


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


def read_rows(sources: Iterable[str], config: DataConfig) -> list[Row]:
    """Read the rows of all sources, in order.

    The columns are those of verl. Optional columns are `data_source`, `ability` and `reward_model` {ground_truth,
    style}; each file may lack any of them.

    Args:
        sources: Parquet files, JSONL files or names of hub data sets.
        config: the section `data`, which names the columns.

    Raises:
        UserError: a source cannot be read, has no rows, or a row is malformed.
    """
    keys = {"data.prompt_key": config.prompt_key}
    if config.teacher_prompt_key is not None:
        keys["data.teacher_prompt_key"] = config.teacher_prompt_key
    if config.answer_key is not None:
        keys["data.answer_key"] = config.answer_key
    rows: list[Row] = []
    for source in sources:
        before = len(rows)
        for where, record in _records(source, keys):
            rows.append(_row(where, record, config, Path(source).stem))
        if len(rows) == before:
            raise UserError(f"the prompt file {source} has no rows; name a file with prompts")
    return rows


def _records(source: str, keys: _Keys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"the prompt file {source} is a folder; name the files in it")
    if not path.exists():
        if path.suffix in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
            several = (
                "; write several files as [a, b]" if "," in source else "; name a file, or a data set as OWNER/NAME"
            )
            raise UserError(f"the prompt file {source} does not exist{several}")
        return _hub(source, keys)
    try:
        with path.open("rb") as file:
            start = file.read(64)
        for first_bytes, advice in _OTHER_FILES:
            if start.startswith(first_bytes):
                raise UserError(f"the prompt file {source} {advice}")
        if path.suffix in (".csv", ".tsv"):
            raise UserError(f"the prompt file {source} is a table of text; save it as JSONL or Parquet")
        is_parquet = path.suffix == ".parquet" or start.startswith(b"PAR1")
        return _parquet(path, keys) if is_parquet else _jsonl(path)
    except OSError as error:
        raise UserError(
            f"cannot read the prompt file {source}: {error.strerror or error}; check its permissions"
        ) from None


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # A column-wise reader needs one type for each column and cannot name the wrong line. Split at \n alone:
    # str.splitlines also splits at characters that a JSON string may contain.
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where}: not UTF-8 text; save the file as UTF-8") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{where}: not JSON ({error.msg} at column {error.colno}); write one object a line"
            ) from None
        except RecursionError:
            raise UserError(
                f"{where}: JSON nested too deeply; a row is one object of text, numbers and messages"
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: a {type(record).__name__}; write one JSON object a line, with a key for each column"
            )
        yield where, record


def _parquet(path: Path, keys: _Keys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # pyarrow comes with datasets; datasets itself would first copy the file into a cache in the home folder.
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise UserError(f"the prompt file {path} is empty; copy it again")
    try:
        with path.open("rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            columns = _columns_to_read(str(path), parquet.schema_arrow.names, keys)
            records = parquet.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:  # text that is not UTF-8 shows as a ValueError
        raise UserError(
            f"{path} cannot be read as Parquet: {error_line(error)}; copy it again, or save it anew"
        ) from None
    return ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))


def _hub(name: str, keys: _Keys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, hub and builder errors share no base class
        raise UserError(
            f"the prompts {name} are not a file here, and no such data set could be loaded from the hub "
            f"({error_line(error)}); "
            "without network, name a Parquet or JSONL file"
        ) from None
    if "train" not in loaded and len(loaded) != 1:
        raise UserError(f"the data set {name} has the splits {', '.join(loaded)} and no 'train': save one as Parquet")
    split = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    records = split.select_columns(_columns_to_read(name, split.column_names, keys))
    return ((f"{name}, row {number}", record) for number, record in enumerate(records, start=1))


def _columns_to_read(source: str, columns: list[str], keys: _Keys) -> list[str]:
    for setting, key in keys.items():
        if key not in columns:
            advice = _advice(setting, columns)
            raise UserError(f"{source} has no column {key!r} ({setting}); it has: {', '.join(columns)}{advice}")
    wanted = {*keys.values(), "data_source", "ability", "reward_model", *_MEDIA_COLUMNS, "input"}
    return [name for name in columns if name in wanted or name.lower() in _ANSWER_COLUMNS]


def _advice(setting: str, columns: Iterable[str]) -> str:
    """Return which key to set for a column that does not exist, with the most likely column."""
    usual = _ANSWER_COLUMNS if setting == "data.answer_key" else _PROMPT_COLUMNS
    names = {name.lower(): name for name in map(str, columns)}
    return next(
        (f"; did you mean {setting}={names[name]}?" for name in usual if name in names),
        f"; set {setting} to one of them",
    )


def _row(where: str, record: Mapping[str, Any], config: DataConfig, file_name: str) -> Row:
    reward = record.get("reward_model") or {}
    if not isinstance(reward, Mapping):
        raise UserError(
            f"{where}: reward_model is a {type(reward).__name__}; store an object with the key ground_truth"
        )
    _check_nothing_is_unread(where, record, config)
    if config.answer_key is not None:
        column, truth = config.answer_key, _value(where, record, config.answer_key, "data.answer_key")
    else:
        column, truth = "reward_model.ground_truth", reward.get("ground_truth")
    try:
        ground_truth = read_ground_truth(truth)
    except ValueError as error:
        raise UserError(f"{where}: {column} {error}") from None
    unused = next((name for name, value in record.items() if name.lower() in _ANSWER_COLUMNS and value is not None), "")
    teacher_key = config.teacher_prompt_key
    return Row(
        prompt=_prompt(where, record, config.prompt_key, "data.prompt_key", config),
        data_source=_label(where, record, "data_source") or file_name,
        ability=_label(where, record, "ability"),
        ground_truth=ground_truth,
        answer_style="exact" if str(reward.get("style")).lower() == "exact" else "rule",
        teacher_prompt=teacher_key and _prompt(where, record, teacher_key, "data.teacher_prompt_key", config),
        answer_column=unused if ground_truth is None else "",
    )


def _check_nothing_is_unread(where: str, record: Mapping[str, Any], config: DataConfig) -> None:
    """Raise UserError for a row whose question is also in a column that nothing reads."""
    for name in _MEDIA_COLUMNS:
        if record.get(name):
            raise UserError(f"{where}: {name!r} is not empty; only text is supported, so leave the row out")
    if config.prompt_key == "instruction" and record.get("input"):
        raise UserError(f"{where}: 'instruction' comes with 'input', which nothing reads; join both into one column")


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
        raise UserError(f"{where}: no {key!r} ({setting}); it has: {known}{_advice(setting, record)}")
    return record[key]
