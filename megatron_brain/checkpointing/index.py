"""The list of a checkpoint's tensors, tensors.json: the boxes of each tensor and the files that hold them."""

import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_brain.checkpointing.boxes import BoxPart, tiles
from megatron_brain.checkpointing.checksums import json_checksum
from megatron_brain.checkpointing.errors import COPY, DamagedError
from megatron_brain.errors import ConfigError
from megatron_brain.files import write_whole

INDEX = "tensors.json"
DATA_FILES = "*.safetensors"

_MAX_DIMENSIONS = 8
"""No weight has so many. `tiles` looks at 2 to this power corners of each box."""


@dataclass(frozen=True, kw_only=True)
class StoredBox:
    """A box, and the file that holds it."""

    part: BoxPart
    file: str
    """Name of a file in the checkpoint's folder."""
    file_size: int
    """Bytes of the whole file."""
    checksum: str | None = None
    """Checksum of the values, see `checksums`; None if the checkpoint has no checksums."""


@dataclass(frozen=True)
class Index:
    """The tensors that a folder holds, and their places."""

    folder: Path
    boxes: dict[str, list[StoredBox]]
    """The boxes of each tensor, at least one."""

    def shape(self, key: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None if the folder does not hold it."""
        return self.boxes[key][0].part.shape if key in self.boxes else None

    @property
    def has_checksums(self) -> bool:
        """Whether the values can be compared with checksums."""
        return all(box.checksum is not None for boxes in self.boxes.values() for box in boxes)


def write_index(folder: Path, stored: Iterable[StoredBox]) -> None:
    """Write the index of a folder's files. Their boxes together must be whole tensors."""
    by_key: dict[str, list[StoredBox]] = {}
    files = {}
    for box in stored:
        by_key.setdefault(box.part.key, []).append(box)
        files[box.file] = box.file_size
    tensors = {}
    for key, boxes in by_key.items():
        first, parts = boxes[0].part, [box.part for box in boxes]
        assert len({(part.dtype, part.shape) for part in parts}) == 1, f"{key} has several dtypes or shapes"
        assert tiles(first.shape, parts), f"the boxes of {key} overlap or leave something out"
        tensors[key] = {
            "dtype": str(first.dtype).removeprefix("torch."),
            "shape": first.shape,
            "boxes": [_described(box) for box in boxes],
        }
    write_whole(folder / INDEX, json.dumps({"files": files, "tensors": tensors}))


def _described(box: StoredBox) -> dict[str, Any]:
    return {"file": box.file, "offset": box.part.offset, "size": box.part.size, "checksum": box.checksum}


def read_index(folder: Path) -> Index:
    """Read and check the list of tensors: boxes must cover each tensor, and files must have the recorded sizes.

    Raises:
        DamagedError: the list is missing or damaged, or a check fails.
        ConfigError: this user may not read the list.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DamagedError(
            f"{folder} has no {INDEX}: it is damaged, or not a checkpoint of this version. {COPY}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; give this user the right to it, or another place"
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    try:
        files = index["files"]
        _check_files(folder, files)
        boxes = {key: _stored_boxes(key, tensor, files) for key, tensor in index["tensors"].items()}
        _check_checksums(boxes)
    except (DamagedError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path, error) from error
    return Index(folder, boxes)


def index_checksum(folder: Path) -> str:
    """A checksum of the names, dtypes, shapes and values of all tensors. It tells apart checkpoints of other weights,
    wherever they are and whichever files hold them. Equal weights that another layout has cut into other boxes count as
    other ones.

    A checkpoint without checksums, of an early version, is told by the sizes and times of its files. So a copy of it
    may count as another one.

    Raises:
        DamagedError, ConfigError: as `read_index`.
    """
    index = read_index(folder)
    found: dict[str, Any] = {}
    for key, boxes in index.boxes.items():
        first = boxes[0].part
        found[key] = [
            str(first.dtype),
            first.shape,
            sorted([box.part.offset, box.part.size, box.checksum or ""] for box in boxes),
        ]
    if not index.has_checksums:
        stats = {file.name: file.stat() for file in folder.glob(DATA_FILES)}
        found[""] = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    return json_checksum(found)


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{path}: the checkpoint is damaged or not complete: {error}. {COPY}")


def _check_files(folder: Path, files: dict[str, int]) -> None:
    there = {file.name: file.stat().st_size for file in folder.glob(DATA_FILES) if file.is_file()}
    for name, size in files.items():
        if name not in there:
            raise DamagedError(f"{name} is not there; do all nodes see this folder?")
        if there[name] != size:
            raise DamagedError(f"{name} has {there[name]} bytes, written were {size}")


def _check_checksums(boxes: dict[str, list[StoredBox]]) -> None:
    """Raise unless all boxes have a checksum or none has: early versions made no checksums."""
    without = sorted(key for key, stored in boxes.items() if any(box.checksum is None for box in stored))
    if without and any(box.checksum is not None for stored in boxes.values() for box in stored):
        raise DamagedError(f"{without[0]} has no checksum, and others have")


def _stored_boxes(key: str, tensor: dict[str, Any], files: dict[str, int]) -> list[StoredBox]:
    dtype = getattr(torch, tensor["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{key} has the dtype {tensor['dtype']!r}")
    shape, stored = _integers(tensor["shape"]), []
    if len(shape) > _MAX_DIMENSIONS:
        raise DamagedError(f"{key} has {len(shape)} dimensions")
    for box in tensor["boxes"]:
        offset, size, name = _integers(box["offset"]), _integers(box["size"]), box["file"]
        if name not in files:
            raise DamagedError(f"{name}, which holds a part of {key}, is not among its files")
        if not len(offset) == len(size) == len(shape):
            raise DamagedError(f"{key} of {len(shape)} dimensions has a part of {len(offset)} or {len(size)}")
        part, checksum = BoxPart(key=key, dtype=dtype, shape=shape, offset=offset, size=size), box.get("checksum")
        if not isinstance(checksum, str | None):
            raise TypeError(f"{key} has the checksum {checksum!r}")
        stored.append(StoredBox(part=part, file=name, file_size=files[name], checksum=checksum))
    if not stored or not tiles(shape, [box.part for box in stored]):
        raise DamagedError(f"{key} is not there in full, or twice")
    return stored


def _integers(values: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(operator.index(value) for value in values)
    if any(value < 0 for value in found):
        raise DamagedError(f"{found} is negative")
    return found
