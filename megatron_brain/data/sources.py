"""Reads records from files, saved data sets and hub data sets, each with its place.

A null field counts as missing: a table has a column, and a struct has a field, for everything that any of its rows has.
So a record is the same whatever it was read from.
"""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from megatron_brain.data import json_values, tables
from megatron_brain.errors import ConfigError, RecordError

Record = tuple[str, dict[str, Any]]
"""Place of the record (``file:line``, ``file[row]`` or ``name[split][row]``) and its fields."""

RawRecord = tuple[str, Any]
"""Place of the record, and a line of JSON as bytes that is not parsed yet, or the fields, or the RecordError of a row
that cannot be read."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""Arrow's names of the compressions, by the endings of compressed files."""


def load_records(source: str, split: str | None = None, limit: int | None = None) -> list[Record]:
    """The records of a source.

    Args:
        source: a .jsonl or .json file (also compressed: .jsonl.gz, .jsonl.zst), a .parquet or .arrow file, a glob of
            such files (read in the order of their names), a folder that `datasets.save_to_disk` wrote, or the hub name
            of a data set.
        split: which split of a saved `DatasetDict` or hub data set, with commas the first of these that it has; other
            sources have none and ignore it.
        limit: read only the first so many records.

    Raises:
        ConfigError: the source does not exist, is empty, or has a file that cannot be read.
        RecordError: a line is not a JSON object; names file and line.
    """
    loaded = [(where, parse_record(where, raw)) for where, raw in islice(raw_records(source, split), limit)]
    if not loaded:
        raise ConfigError(f"{source}: no records in it; write some into it")
    return loaded


def raw_records(source: str, split: str | None = None) -> Iterator[RawRecord]:
    """The records of a source, not parsed yet and read on demand, for :func:`parse_record`.

    Raises:
        ConfigError: the source does not exist, or has a file that cannot be read.
    """
    if not source.strip():
        raise ConfigError("the name of the records is empty: give a file, a glob, a saved data set or a hub name")
    if Path(source).is_dir():
        return tables.read_saved(source, split)
    if paths := _paths(source):
        return chain.from_iterable(map(_read_file, paths))
    if _HUB_NAME.fullmatch(source) and not is_record_file(source):
        return tables.read_hub(source, split)
    raise ConfigError(f"{source}: no such file (looked for {Path(source).absolute()}); give one that is there")


def parse_record(where: str, raw: Any) -> dict[str, Any]:
    """The fields of a raw record, without null fields at any depth.

    Raises:
        RecordError: the record is not text, not JSON, or not a JSON object.
    """
    if isinstance(raw, RecordError):
        raise raw
    value = raw
    if isinstance(raw, bytes):
        value = json_values.decode(raw, where)
        if b"\\u" in raw:
            json_values.require_text(value, where)
    if not isinstance(value, dict):
        raise RecordError(
            where, "no JSON object", f"must be a JSON object with named fields, not {type(value).__name__}"
        )
    try:
        fields: dict[str, Any] = json_values.without_nulls(value)
        return fields
    except RecursionError as error:
        raise RecordError(where, "nested too deeply", "is nested too deeply to be read; remove the record") from error


def source_files(source: str) -> list[Path]:
    """The files of a source, in the order in which they are read; none where it is a hub name."""
    if Path(source).is_dir():
        return sorted(path for path in Path(source).rglob("*") if path.is_file())
    return _paths(source)


def is_record_file(path: str | Path) -> bool:
    """Whether a name has the ending of a file with records."""
    return _reader_of(Path(path)) is not None


def _paths(source: str) -> list[Path]:
    return [Path(source)] if Path(source).is_file() else [Path(path) for path in sorted(glob.glob(source))]


def _read_file(path: Path) -> Iterator[RawRecord]:
    reader = _reader_of(path)
    if reader is None:
        compressed = [f".jsonl{ending}" for ending in _COMPRESSIONS]
        raise ConfigError(f"{path}: unknown kind of file; must be one of {', '.join([*_READERS, *compressed])}")
    empty = True
    for record in reader(path):
        empty = False
        yield record
    if empty:
        raise ConfigError(f"{path}: the file is empty; write records into it, or leave it out")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file to read bytes from, unpacked where its name says that it is compressed."""
    try:
        if path.suffix not in _COMPRESSIONS:
            with path.open("rb") as file:
                yield file
            return
        import pyarrow

        with pyarrow.input_stream(str(path), compression=_COMPRESSIONS[path.suffix]) as unpacked:
            yield io.BufferedReader(unpacked)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}; {tables.CURE}") from error


def _read_jsonl(path: Path) -> Iterator[RawRecord]:
    with _opened(path) as file:  # In bytes only "\n" ends a line, and bad UTF-8 is reported with its line.
        for number, line in enumerate(file, start=1):
            if line.removeprefix(json_values.BOM).strip():
                yield f"{path}:{number}", line


def _read_json(path: Path) -> Iterator[RawRecord]:
    with _opened(path) as file:
        start = file.read(4096)
        is_array = start.removeprefix(json_values.BOM).lstrip(b" \t\r\n").startswith(b"[")
        data = start + file.read() if is_array else b""
    if not is_array:
        yield from _read_jsonl(path)
        return
    for row, value in enumerate(json_values.decode(data, str(path))):
        where = f"{path}[{row}]"
        try:
            yield where, json_values.require_text(value, where)
        except RecordError as error:
            yield where, error


_READERS: dict[str, Callable[[Path], Iterator[RawRecord]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": tables.read_parquet,
    ".arrow": tables.read_arrow,
}


def _reader_of(path: Path) -> Callable[[Path], Iterator[RawRecord]] | None:
    """The function that reads files with this ending. Files of tables have their own compression."""
    if path.suffix not in _COMPRESSIONS:
        return _READERS.get(path.suffix)
    inner = Path(path.stem).suffix
    return _READERS[inner] if inner in (".jsonl", ".json") else None
