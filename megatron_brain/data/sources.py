"""Sources of records: files, saved data sets and hub data sets, each record with the place it came from."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from megatron_brain.data.errors import RecordError

Record = tuple[str, dict[str, Any]]
"""Place of the record (``file:line``, ``file[row]`` or ``name[split][row]``) and its fields."""

RawRecord = tuple[str, Any]
"""Place of the record and what stands there: a line of JSON as bytes, not looked into yet, or the fields."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_records(source: str, split: str | None = None, limit: int | None = None) -> list[Record]:
    """The records of a source.

    Args:
        source: a .jsonl, .json, .parquet or .arrow file, a glob of such files (read in the order of their names),
            a folder that `datasets.save_to_disk` wrote, or the hub name of a data set.
        split: which split of a saved `DatasetDict` or hub data set; other sources have none and ignore it.
        limit: read only the first so many records.

    Raises:
        ValueError: nothing there, nothing in it, or a line that is no JSON object: naming file and line.
    """
    loaded = [(where, parse_record(where, raw)) for where, raw in islice(raw_records(source, split), limit)]
    if not loaded:
        raise ValueError(f"{source}: no records in it")
    return loaded


def raw_records(source: str, split: str | None = None) -> Iterator[RawRecord]:
    """The records of a source as they stand there, read on demand, for :func:`parse_record`.

    Raises:
        ValueError: nothing there, or a file that cannot be read.
    """
    if Path(source).is_dir():
        return _read_saved(source, split)
    if paths := _paths(source):
        return chain.from_iterable(map(_read_file, paths))
    if _HUB_NAME.fullmatch(source) and Path(source).suffix not in _READERS:
        return _read_hub(source, split)
    raise ValueError(f"{source}: no such file (looked for {Path(source).absolute()})")


def parse_record(where: str, raw: Any) -> dict[str, Any]:
    """The fields of a raw record.

    Raises:
        RecordError: it is no JSON, or no JSON object.
    """
    value = _parse_json(raw, where) if isinstance(raw, bytes) else raw
    if not isinstance(value, dict):
        raise RecordError(
            where, "no JSON object", f"must be a JSON object with named fields, not {type(value).__name__}"
        )
    return value


def source_files(source: str) -> list[Path]:
    """The files a source is read from, in order; none where it is a hub name."""
    if Path(source).is_dir():
        return sorted(path for path in Path(source).rglob("*") if path.is_file())
    return _paths(source)


def _paths(source: str) -> list[Path]:
    return [Path(source)] if Path(source).is_file() else [Path(path) for path in sorted(glob.glob(source))]


def _read_file(path: Path) -> Iterator[RawRecord]:
    if path.suffix not in _READERS:
        raise ValueError(f"{path}: unknown kind of file; must be one of {', '.join(_READERS)}")
    empty = True
    for record in _READERS[path.suffix](path):
        empty = False
        yield record
    if empty:
        raise ValueError(f"{path}: the file is empty")


def _read_jsonl(path: Path) -> Iterator[RawRecord]:
    with path.open("rb") as file:  # bytes: only "\n" ends a line, and bad UTF-8 is reported with its line
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path}:{number}", line


def _read_json(path: Path) -> Iterator[RawRecord]:
    with path.open("rb") as file:
        is_array = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_array:
        yield from _read_jsonl(path)
        return
    for row, value in enumerate(_parse_json(path.read_bytes(), str(path))):
        yield f"{path}[{row}]", value


def _parse_json(data: bytes, where: str) -> Any:
    try:
        value = json.loads(data)
        if b"\\u" in data:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise RecordError(where, "invalid JSON", f"not valid JSON: {error}") from error
    return value


def _read_parquet(path: Path) -> Iterator[RawRecord]:
    import pyarrow.parquet

    return _read_batches(path, lambda: pyarrow.parquet.ParquetFile(path).iter_batches())


def _read_arrow(path: Path) -> Iterator[RawRecord]:
    import pyarrow

    def batches() -> Iterable:
        with path.open("rb") as file:
            is_file_format = file.read(6) == b"ARROW1"
        source = pyarrow.memory_map(str(path))
        if not is_file_format:
            return pyarrow.ipc.open_stream(source)
        reader = pyarrow.ipc.open_file(source)
        return map(reader.get_batch, range(reader.num_record_batches))

    return _read_batches(path, batches)


def _read_batches(path: Path, open_batches: Callable[[], Iterable]) -> Iterator[RawRecord]:
    import pyarrow

    try:
        rows = chain.from_iterable(batch.to_pylist() for batch in open_batches())
        for row, record in enumerate(rows):
            yield f"{path}[{row}]", record
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:]}: {error}") from error


_READERS: dict[str, Callable[[Path], Iterator[RawRecord]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
RECORD_SUFFIXES = tuple(_READERS)
"""Endings of the files that hold records."""


def _read_saved(source: str, split: str | None) -> Iterator[RawRecord]:
    import datasets

    try:
        loaded = datasets.load_from_disk(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{source}: a folder that datasets.save_to_disk did not write ({error}); "
            f"for a folder of files give a glob such as {source.rstrip('/')}/*.jsonl"
        ) from error
    return _rows(source, loaded, split)


def _read_hub(source: str, split: str | None) -> Iterator[RawRecord]:
    import datasets

    try:
        loaded = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source}: no such file (looked for {Path(source).absolute()}), "
            f"and not a data set that can be loaded from the hub ({type(error).__name__}: {error})"
        ) from error
    return _rows(source, loaded, split)


def _rows(source: str, loaded: Any, split: str | None) -> Iterator[RawRecord]:
    """Rows of a `Dataset`, or of one split of a `DatasetDict`."""
    if isinstance(loaded, dict):
        if split is None and len(loaded) == 1:
            split = next(iter(loaded))
        if split not in loaded:
            raise ValueError(f"{source}: no split {split!r}; it has {', '.join(loaded)}")
        source, loaded = f"{source}[{split}]", loaded[split]
    return ((f"{source}[{row}]", record) for row, record in enumerate(loaded))
