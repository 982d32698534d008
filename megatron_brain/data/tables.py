"""Reads the rows of Arrow tables and of `datasets` data sets as JSON values."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_brain.data.json_values import require_text
from megatron_brain.errors import ConfigError, RecordError

if TYPE_CHECKING:
    import datasets
    import pyarrow

log = logging.getLogger(__name__)

CURE = "copy it here again, let this user read it, or give it the ending of its kind"
"""What the user can do where a file cannot be read."""

_BATCH = 1000
_UNREADABLE = (ValueError, KeyError, OverflowError)
"""Errors of reading a column: a value is not UTF-8 or not JSON, has a key twice, or does not exist in Python."""

_WITHOUT_STRUCTS = "Polars"
"""The name of Polars before 1.0 in its parquet files. For a missing struct it wrote a struct of null fields."""

Row = tuple[str, Any]
"""Place of a row, and its fields, or the RecordError of a row that cannot be read."""


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file.

    Raises:
        ConfigError: it cannot be read.
    """
    import pyarrow.parquet

    keeps_structs = True

    def batches() -> Iterable[pyarrow.RecordBatch]:
        nonlocal keeps_structs
        file = pyarrow.parquet.ParquetFile(path)
        keeps_structs = file.metadata.created_by != _WITHOUT_STRUCTS
        found: Iterable[pyarrow.RecordBatch] = file.iter_batches()
        return found

    for where, row in _read_batches(path, batches):
        yield where, row if keeps_structs or isinstance(row, RecordError) else _without_empty(row)


def read_arrow(path: Path) -> Iterator[Row]:
    """Rows of an Arrow file, in the stream or the file format.

    Raises:
        ConfigError: it cannot be read.
    """
    import pyarrow

    def batches() -> Iterable[pyarrow.RecordBatch]:
        with path.open("rb") as file:
            is_file_format = file.read(6) == b"ARROW1"
        source = pyarrow.memory_map(str(path))
        if not is_file_format:
            stream: Iterable[pyarrow.RecordBatch] = pyarrow.ipc.open_stream(source)
            return stream
        reader = pyarrow.ipc.open_file(source)
        return map(reader.get_batch, range(reader.num_record_batches))

    return _read_batches(path, batches)


def read_saved(source: str, split: str | None) -> Iterator[Row]:
    """Rows of a folder that `datasets.save_to_disk` wrote; of the given split where it has several.

    Raises:
        ConfigError: the folder is not of this kind, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(source)
    except Exception as error:  # Wrong files in the folder cause errors of many unrelated types.
        raise ConfigError(
            f"{source}: a folder that datasets.save_to_disk did not write, or that is damaged or empty "
            f"({type(error).__name__}: {error}); write it anew, or for a folder of files give a glob such as "
            f"{source.rstrip('/')}/*.jsonl"
        ) from error
    return _read_split(source, loaded, split)


def read_hub(source: str, split: str | None) -> Iterator[Row]:
    """Rows of a hub data set; of the given split where it has several.

    Raises:
        ConfigError: the data set cannot be loaded, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{source}: no such file (looked for {Path(source).absolute()}), "
            f"and not a data set that can be loaded from the hub ({type(error).__name__}: {error})"
        ) from error
    return _read_split(source, loaded, split)


def _read_split(source: str, loaded: Any, split: str | None) -> Iterator[Row]:
    """Rows of a `Dataset`, or of one split of a `DatasetDict`: the first that it has of those in `split`."""
    if isinstance(loaded, dict):
        wanted = list(loaded) if split is None and len(loaded) == 1 else (split or "").split(",")
        found = next((name for name in wanted if name in loaded), None)
        if found is None:
            raise ConfigError(f"{source}: no split {split!r}; it has {', '.join(loaded)}")
        if found != wanted[0]:
            log.info("%s: it has no split %s; %s is read", source, wanted[0], found)
        source, loaded = f"{source}[{found}]", loaded[found]
    return _read_data_set(source, loaded)


def _read_data_set(source: str, data: datasets.Dataset) -> Iterator[Row]:
    """Rows of a data set, with all columns whatever format was set when it was saved. Media are not decoded."""
    import pyarrow

    first = 0
    try:
        for table in data.with_format("arrow").iter(batch_size=_BATCH):
            for batch in table.to_batches():
                yield from _rows_of(batch, source, first)
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}; write it anew") from error


def _read_batches(path: Path, open_batches: Callable[[], Iterable[pyarrow.RecordBatch]]) -> Iterator[Row]:
    import pyarrow

    first = 0
    try:
        for batch in open_batches():
            yield from _rows_of(batch, path, first)
            first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: cannot be read as {path.suffix[1:]}: {error}; {CURE}") from error


def _rows_of(batch: pyarrow.RecordBatch, source: Path | str, first: int) -> Iterator[Row]:
    """Rows of a batch, the first of which is row `first` of the source."""
    names = batch.schema.names
    _require_sound(batch, source)
    try:
        columns = [_values(column) for column in batch.columns]
    except _UNREADABLE:
        for row in range(batch.num_rows):
            where = f"{source}[{first + row}]"
            yield where, _row_or_error(batch.slice(row, 1), where)
        return
    for row, values in enumerate(zip(*columns, strict=True)):
        yield f"{source}[{first + row}]", dict(zip(names, values, strict=True))


def _require_sound(batch: pyarrow.RecordBatch, source: Path | str) -> None:
    """Raise ConfigError where a column's lengths contradict each other: reading it would crash the process.

    Text that is not UTF-8 is reported later, with its row.
    """
    import pyarrow

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "Invalid UTF8" not in str(error):
                raise ConfigError(f"{source}: damaged in its column {name!r} ({error}); {CURE}") from error


def _row_or_error(row: pyarrow.RecordBatch, where: str) -> dict[str, Any] | RecordError:
    fields = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            [value] = column.to_pylist(maps_as_pydicts="strict")
        except UnicodeDecodeError as error:
            return _no_text(where, f"field {name!r}", error)
        except KeyError as error:  # A map raises it.
            return RecordError(where, "wrong type", f"field {name!r} has a key twice: write the table anew ({error})")
        except _UNREADABLE as error:  # One cause is a date after the year 9999.
            return RecordError(
                where,
                "wrong type",
                f"field {name!r} has a value that cannot be read ({type(error).__name__}: {error}): write the table "
                "anew, without the column where nothing needs it",
            )
        try:
            fields[name] = _from_json(value, column.type) if _holds_json(column.type) else value
        except RecordError as error:
            return RecordError(where, error.kind, f"field {name!r}: {error.message}")
        except json.JSONDecodeError as error:
            return RecordError(where, "invalid JSON", f"field {name!r} is of Arrow's JSON type and no JSON: {error}")
    return fields


def _no_text(where: str, field: str, error: UnicodeDecodeError) -> RecordError:
    return RecordError(
        where, "not UTF-8", f"{field} is not UTF-8 text ({error.reason} at byte {error.start}): write the table anew"
    )


def _without_empty(value: Any) -> Any:
    """A value in which objects that hold only nulls are null themselves."""
    if isinstance(value, list):
        return [_without_empty(member) for member in value]
    if not isinstance(value, dict):
        return value
    inner = {key: _without_empty(member) for key, member in value.items()}
    return None if all(member is None for member in inner.values()) else inner


def _values(column: pyarrow.Array) -> list[Any]:
    """The values of a column. Maps become objects, and texts of Arrow's JSON type are parsed."""
    values = column.to_pylist(maps_as_pydicts="strict")
    return [_from_json(value, column.type) for value in values] if _holds_json(column.type) else values


def _holds_json(kind: pyarrow.DataType) -> bool:
    """Whether a type is Arrow's JSON type or contains it."""
    return _is_json(kind) or any(_holds_json(kind.field(place).type) for place in range(kind.num_fields))


def _is_json(kind: pyarrow.DataType) -> bool:
    # `datasets` stores its Json feature as this type.
    return getattr(kind, "extension_name", None) == "arrow.json"


def _from_json(value: Any, kind: pyarrow.DataType) -> Any:
    """A value of `to_pylist` in which texts of Arrow's JSON type are parsed."""
    import pyarrow

    if value is None:
        return None
    if _is_json(kind):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            raise
        except ValueError as error:  # A number may have more digits than Python reads.
            raise RecordError("", "invalid JSON", str(error)) from error
        return parsed if "\\u" not in value else require_text(parsed, "")
    if isinstance(value, list):
        return [_from_json(member, kind.value_type) for member in value]
    if pyarrow.types.is_map(kind):
        return {key: _from_json(member, kind.item_type) for key, member in value.items()}
    if isinstance(value, dict):
        inner = {kind.field(place).name: kind.field(place).type for place in range(kind.num_fields)}
        return {key: _from_json(member, inner[key]) for key, member in value.items()}
    return value
