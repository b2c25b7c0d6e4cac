"""Read the rows of prompt files (Parquet, JSONL, hub data sets). Errors name the file and the line or row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_oprd.config import DataConfig
from megatron_oprd.data.json_lines import parse_object, read_lines
from megatron_oprd.data.prompt_rows import Row, column_advice, columns_to_read, read_row
from megatron_oprd.runtime.files import GET_LFS_FILE, LFS_START
from megatron_oprd.runtime.readable import error_line
from megatron_oprd.types import UserError

_Keys = dict[str, str]  # configuration key -> name of a column that every row must have
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# First bytes of files that are neither Parquet nor JSONL, and what to do.
_OTHER_FILES = (
    (b"\x1f\x8b", "is compressed; unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "is compressed; unpack it with unzstd"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (LFS_START, f"is a pointer of Git LFS; {GET_LFS_FILE}"),
    (b"ARROW1", "is an Arrow file; save it as Parquet"),
    (b"<", "is a page of the web; download the file itself"),
    (b"[\n", "is one JSON array; write one object a line: jq -c '.[]' FILE > FILE.jsonl"),
    (b"[{", "is one JSON array; write one object a line: jq -c '.[]' FILE > FILE.jsonl"),
    (b"\xff\xfe", "is UTF-16 text; save it as UTF-8"),
    (b"\xfe\xff", "is UTF-16 text; save it as UTF-8"),
)
_FILE_SUFFIXES = {".parquet", ".jsonl", ".json", ".ndjson", ".txt", ".csv", ".gz", ".zst"}


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
            rows.append(read_row(where, record, config, Path(source).stem))
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
    # A column-wise reader needs one type for each column and cannot name the wrong line.
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, parse_object(line)
            except ValueError as error:
                raise UserError(f"{where}: {error}") from None


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
            f"({error_line(error)}); without network, name a Parquet or JSONL file"
        ) from None
    if "train" not in loaded and len(loaded) != 1:
        raise UserError(f"the data set {name} has the splits {', '.join(loaded)} and no 'train': save one as Parquet")
    split = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    records = split.select_columns(_columns_to_read(name, split.column_names, keys))
    return ((f"{name}, row {number}", record) for number, record in enumerate(records, start=1))


def _columns_to_read(source: str, columns: list[str], keys: _Keys) -> list[str]:
    for setting, key in keys.items():
        if key not in columns:
            advice = column_advice(setting, columns)
            raise UserError(f"{source} has no column {key!r} ({setting}); it has: {', '.join(columns)}{advice}")
    wanted = columns_to_read(columns, keys.values())
    twice = next((name for name in wanted if wanted.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{source} has two columns {twice!r}; rename one of them")
    return wanted
