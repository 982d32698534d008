"""Reads a checkpoint's data files."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open

from megatron_brain.checkpointing.boxes import BoxPart
from megatron_brain.checkpointing.errors import CURE, CheckpointError, DamagedError
from megatron_brain.checkpointing.index import StoredBox
from megatron_brain.files import explained

T = TypeVar("T")

_MAPPED_BYTES = 256 * 2**20


def stored_name(part: BoxPart) -> str:
    """Name of a box in its file."""
    return f"{part.key}@{','.join(map(str, part.offset))}"


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Open a file of boxes to read from it.

    Raises:
        DamagedError: the file is damaged.
        ConfigError: this user may not read the file.
        CheckpointError: the disk fails to read the file.
    """
    try:
        with explained():
            path.open("rb").close()  # The library reports every file that it may not open as missing.
        with safe_open(path, framework="pt") as data:
            yield data
    except SafetensorError as error:
        raise DamagedError(f"{path} is damaged: {error}. {CURE}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def by_file(items: Iterable[T], of: Callable[[T], StoredBox]) -> Iterator[tuple[str, list[T]]]:
    """Batches of items, each with the name of its one file, which is to be closed after the batch.

    What was read of a file counts as this process's memory until then. So a batch is at most 256 MiB, or one box.

    Args:
        items: items in any order.
        of: gives the box of an item.
    """
    ordered = sorted(items, key=lambda item: (of(item).file, of(item).part.key, of(item).part.offset))
    for file, members in itertools.groupby(ordered, key=lambda item: of(item).file):
        for batch in _batches(members, of):
            yield file, batch


def _batches(items: Iterable[T], of: Callable[[T], StoredBox]) -> Iterator[list[T]]:
    """Cut items into batches whose boxes together are no larger than what may be mapped."""
    batch: list[T] = []
    mapped = 0
    for item in items:
        nbytes = of(item).part.nbytes
        if batch and mapped + nbytes > _MAPPED_BYTES:
            yield batch
            batch, mapped = [], 0
        batch.append(item)
        mapped += nbytes
    yield batch
