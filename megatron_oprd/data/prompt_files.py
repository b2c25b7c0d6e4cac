"""Read the rows of prompt files (Parquet, JSONL, hub data sets). Errors name the file and the line or row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_oprd.types import UserError

Message = dict[str, str]  # {"role": ..., "content": ...}
_Keys = dict[str, str]  # configuration key -> name of a column that every row must have
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_FILE_SUFFIXES = {".parquet", ".jsonl", ".json", ".ndjson", ".txt", ".csv", ".gz", ".zst"}


@dataclass(frozen=True)
class Row:
    """A row of a prompt file. A missing column leaves the default."""

    prompt: str | list[Message]  # plain text or a conversation
    data_source: str = ""
    ability: str = ""
    ground_truth: str | None = None
    answer_style: Literal["rule", "exact"] = "rule"
    teacher_prompt: str | list[Message] | None = None  # the prompt for the teacher; None: the student's prompt


def read_rows(sources: Iterable[str], prompt_key: str, teacher_prompt_key: str | None = None) -> list[Row]:
    """Read the rows of all sources, in order.

    The columns are those of verl. Optional columns are `data_source`, `ability` and `reward_model` {ground_truth,
    style}; each file may lack any of them.

    Args:
        sources: Parquet files, JSONL files or names of hub data sets.
        prompt_key: the column with the prompt: a string, or a list of {role, content}.
        teacher_prompt_key: the column with the teacher's prompt, in the same form; None: there is none.

    Raises:
        UserError: a source cannot be read, has no rows, or a row is malformed.
    """
    keys = {"data.prompt_key": prompt_key}
    if teacher_prompt_key is not None:
        keys["data.teacher_prompt_key"] = teacher_prompt_key
    rows: list[Row] = []
    for source in sources:
        before = len(rows)
        for where, record in _records(source, keys):
            rows.append(_row(where, record, keys, Path(source).stem))
        if len(rows) == before:
            raise UserError(f"the prompt file {source} has no rows")
    return rows


def _records(source: str, keys: _Keys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"the prompt file {source} is a folder: name the files in it")
    if not path.exists():
        if path.suffix in _FILE_SUFFIXES or not _HUB_NAME.fullmatch(source):
            raise UserError(f"the prompt file {source} does not exist")
        return _hub(source, keys)
    try:
        with path.open("rb") as file:
            is_parquet = path.suffix == ".parquet" or file.read(4) == b"PAR1"
        return _parquet(path, keys) if is_parquet else _jsonl(path)
    except OSError as error:
        raise UserError(f"cannot read the prompt file {source}: {error.strerror or error}") from None


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
            raise UserError(f"{where}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}); one object a line") from None
        except RecursionError:
            raise UserError(f"{where}: JSON nested too deeply") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected one JSON object a line, not a {type(record).__name__}")
        yield where, record


def _parquet(path: Path, keys: _Keys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    # pyarrow comes with datasets; datasets itself would first copy the file into a cache in the home folder.
    import pyarrow
    import pyarrow.parquet

    if path.stat().st_size == 0:
        raise UserError(f"the prompt file {path} is empty")
    try:
        with path.open("rb") as file:
            parquet = pyarrow.parquet.ParquetFile(file)
            columns = _columns_to_read(str(path), parquet.schema_arrow.names, keys)
            records = parquet.read(columns=columns).to_pylist()
    except (pyarrow.ArrowException, ValueError) as error:  # text that is not UTF-8 shows as a ValueError
        raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from None
    return ((f"{path}, row {number}", record) for number, record in enumerate(records, start=1))


def _hub(name: str, keys: _Keys) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # network, hub and builder errors share no base class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"the prompts {name} are not a file here, and no such data set could be loaded from the hub ({reason}); "
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
            raise UserError(f"{source} has no column {key!r} ({setting}); it has: {', '.join(columns)}")
    return [name for name in columns if name in {*keys.values(), "data_source", "ability", "reward_model"}]


def _row(where: str, record: Mapping[str, Any], keys: _Keys, file_name: str) -> Row:
    prompts = {setting: _prompt(where, record, key, setting) for setting, key in keys.items()}
    reward = record.get("reward_model") or {}
    if not isinstance(reward, Mapping):
        raise UserError(f"{where}: reward_model must be an object with ground_truth, not a {type(reward).__name__}")
    ground_truth = reward.get("ground_truth")
    return Row(
        prompt=prompts["data.prompt_key"],
        data_source=str(record.get("data_source") or file_name),
        ability=str(record.get("ability") or ""),
        ground_truth=None if ground_truth is None else str(ground_truth),
        answer_style="exact" if reward.get("style") == "exact" else "rule",
        teacher_prompt=prompts.get("data.teacher_prompt_key"),
    )


def _prompt(where: str, record: Mapping[str, Any], key: str, setting: str) -> str | list[Message]:
    if key not in record:
        raise UserError(f"{where}: no {key!r} ({setting}); it has: {', '.join(map(str, record)) or '-'}")
    value = record[key]
    if isinstance(value, str):
        return value
    problem = f"a {type(value).__name__}"
    if isinstance(value, list):
        wrong = next((message for message in value if not _is_message(message)), None)
        if value and wrong is None:
            return [{"role": message["role"], "content": message["content"]} for message in value]
        problem = f"a list with {str(wrong)[:60]}" if value else "an empty list"
    raise UserError(f"{where}: {key!r} must be a string or a list of {{role, content}}, not {problem}")


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))
